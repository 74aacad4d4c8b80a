"""A stage that learns from its own answers, on the loop: see ``StageContext.train_sampled``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from posttrain.data.records import Question
from posttrain.engine.config import SampledConfig
from posttrain.engine.evaluation import Evaluation
from posttrain.engine.stage import carry_out, check_vocabulary, make_training, switch_dropout_off
from posttrain.errors import BadInput, PluginFailed, Problem
from posttrain.sampling.answers import prompt_ids
from posttrain.sampling.objective import Asked, PolicyLoss, SampledObjective, trail_figures

if TYPE_CHECKING:
    from posttrain.context import StageContext


def train_sampled(context: StageContext, questions: Sequence[Question], loss: PolicyLoss) -> None:
    """Train the parent's policy on its own answers and save it."""
    config: SampledConfig = context.config
    if context.scorer is None:
        raise PluginFailed(f"stage {context.name!r} has no rewards: its settings must answer rewarding()")
    if not questions:
        raise BadInput(Problem(where=f"{context.name}.data", what="holds no question", fix="Give questions to answer"))
    tokenizer = context.tokenizer()
    prompts = prompt_ids(context.renderer(), questions)
    for question, prompt in zip(questions, prompts, strict=True):
        if len(prompt) + config.max_tokens > config.sequence_length:
            what = f"{len(prompt):,} tokens and an answer of {config.max_tokens:,} exceed {config.sequence_length:,}"
            fix = f"Raise {context.name}.sequence_length, or lower {context.name}.max_tokens"
            raise BadInput(Problem(where=question.where, what=what, fix=fix))
    rows = [Asked(question=question, prompt=prompt) for question, prompt in zip(questions, prompts, strict=True)]
    model = context.policy()
    switch_dropout_off(model)
    check_vocabulary((max(prompt) for prompt in prompts), model)
    trail = context.trail or context.checkpoints / "answers"
    training = make_training(
        context,
        model,
        rows,
        Evaluation(rows=(), refusals=0, config=config),
        make_objective=partial(
            SampledObjective,
            loss=loss,
            scorer=context.scorer,
            tokenizer=tokenizer,
            first=rows[: config.per_device_batch_size],
            seed=context.seed,
            stored=context.dtype,
            trail=trail,
            progress=context.progress,
        ),
    )
    position = carry_out(context, training)
    figures = trail_figures(trail, position.step)
    last = {name: training.last[name] for name in ("reward", "entropy", "cut", "spread", "kl") if name in training.last}
    context.metrics.update(steps=position.step, tokens=figures["sampled_tokens"], final_loss=position.loss)
    context.metrics.update(questions=len(questions), **figures, **last)
    context.save(model)
