"""A stage that learns from its own answers, on the loop: see ``StageContext.train_sampled``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from posttrain.data.records import Question
from posttrain.engine import processes
from posttrain.engine.answers import set_aside
from posttrain.engine.config import SampledConfig
from posttrain.engine.stage import carry_out, check_vocabulary, make_training, switch_dropout_off
from posttrain.errors import BadInput, PluginFailed, Problem
from posttrain.sampling.answers import prompt_ids
from posttrain.sampling.evaluation import GreedyReward
from posttrain.sampling.gate import GateCourse, GateSample
from posttrain.sampling.objective import PolicyLoss, SampledObjective
from posttrain.sampling.policy import Asked, Policy
from posttrain.sampling.trail import Trail

if TYPE_CHECKING:
    from posttrain.context import StageContext


def train_sampled(
    context: StageContext, questions: Sequence[Question], loss: PolicyLoss, sample: GateSample | None = None
) -> None:
    """Train the parent's policy on its own answers and save it; the documents of ``sample`` are asked alone."""
    config: SampledConfig = context.config
    if context.scorer is None:
        raise PluginFailed(f"stage {context.name!r} has no rewards: its settings must answer rewarding()")
    if not questions:
        raise BadInput(Problem(where=f"{context.name}.data", what="holds no question", fix="Give questions to answer"))
    rows, measured = set_aside(_asked(context, questions), config.eval_share, context.seed, context.clusters)
    measured += _asked(context, context.eval_records)
    model = context.policy()
    switch_dropout_off(model)
    check_vocabulary((max(row.prompt) for row in [*rows, *measured]), model)
    policy = Policy(tokenizer=context.tokenizer(), scorer=context.scorer, progress=context.progress)
    trail = Trail(context.trail or context.checkpoints / "answers", config.k)
    different = {tuple(row.prompt): row for row in measured}  # one that is repeated by weight tells nothing more
    # one process that has no sample would not wait for the others
    gate = GateCourse(sample=None if processes.agree(sample is None) else sample, progress=context.progress)
    evaluation = GreedyReward(rows=list(different.values()), config=config, policy=policy, trail=trail, gate=gate)
    training = make_training(
        context,
        model,
        rows,
        evaluation,
        make_objective=partial(
            SampledObjective,
            loss=loss,
            policy=policy,
            first=rows[: config.per_device_batch_size],
            seed=context.seed,
            stored=context.dtype,
            trail=trail,
        ),
    )
    position = carry_out(context, training)
    samplings = -(-position.step // config.updates)
    trail.require_spread(samplings, samplings)  # of fewer steps than idle_steps: the weights are the parent's
    figures = trail.figures(samplings)
    last = {name: training.last[name] for name in ("reward", "entropy", "cut", "spread", "kl") if name in training.last}
    context.metrics.update(steps=position.step, tokens=figures["sampled_tokens"], final_loss=position.loss)
    context.metrics.update(questions=len(rows), **figures, **last)
    ends = figures["reward_first"], figures["reward_last"]
    left_behind = [*evaluation.left_behind(*ends), *gate.left_behind(*ends)] if figures["reward_rose"] else []
    for line in [*left_behind, *evaluation.gone_apart()]:
        context.warn(line)
    context.save(model)


def _asked(context: StageContext, questions: Sequence[Question]) -> list[Asked]:
    """Return questions with their prompts as token ids. Raises BadInput for one that leaves no room for an answer."""
    config: SampledConfig = context.config
    prompts = prompt_ids(context.renderer(), questions)
    for question, prompt in zip(questions, prompts, strict=True):
        if len(prompt) + config.max_tokens > config.sequence_length:
            what = f"{len(prompt):,} tokens and an answer of {config.max_tokens:,} exceed {config.sequence_length:,}"
            fix = f"Raise {context.name}.sequence_length, or lower {context.name}.max_tokens"
            raise BadInput(Problem(where=question.where, what=what, fix=fix))
    return [Asked(question=question, prompt=prompt) for question, prompt in zip(questions, prompts, strict=True)]
