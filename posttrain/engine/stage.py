"""The loop in a stage: rows from the store, reach, idle weights and eval loss in reports, and answers trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from posttrain.data.held import digest_records, release
from posttrain.data.records import Feedback, Preference
from posttrain.engine.answer_objective import AnswerEvaluation, AnswerLoss, AnswerObjective, Numbered
from posttrain.engine.answers import AnsweredRow
from posttrain.engine.checkpoint import Position
from posttrain.engine.config import LoopConfig
from posttrain.engine.evaluation import Evaluation
from posttrain.engine.loop import Training
from posttrain.engine.start import LogProbs, Start
from posttrain.errors import BadInput, Problem
from posttrain.model.targets import measure_reach, reach_faults, reach_note
from posttrain.tokens.filling import Fill, count_workers
from posttrain.tokens.judged import JudgedAnswer, Judging, answers_of
from posttrain.tokens.store import store_key, stored_table
from posttrain.tokens.table import TableRow, TokenTable

if TYPE_CHECKING:
    from posttrain.context import StageContext

Row = TypeVar("Row", bound=AnsweredRow)


def stored_rows(
    context: StageContext,
    records: Sequence[Any],
    tokenizer: Any,
    rows: Callable[[Sequence[Any]], Iterable[TableRow]],
    **settings: Any,
) -> TokenTable:
    """Return the rows of ``records`` from the store of all runs; ``rows`` renders those missing there.

    ``settings`` are the other inputs of ``rows`` as JSON values. Raises BadInput for a record that cannot be rendered,
    Interrupted when a stop is requested.
    """
    if not records:
        return TokenTable.of([])
    fill = Fill(
        records=records,
        rows=rows,
        note=context.progress.note,
        part=context.progress.part,
        stop_requested=context.stop_requested,
        workers=count_workers(context.data_workers),
    )
    variables = dict(context.parent.template_variables)
    key = store_key(digest_records(records), tokenizer, **settings, variables=variables)
    table = stored_table((context.kept or context.checkpoints) / "tokens", key, fill)
    release(records)  # what trains reads the table alone
    return table


def judged_answers(context: StageContext, records: Sequence[Preference | Feedback]) -> Iterator[JudgedAnswer]:
    """Yield the answers of ``records``; see ``StageContext.answers``."""
    if not records:
        return iter(())
    tokenizer = context.tokenizer()
    return answers_of(stored_rows(context, records, tokenizer, Judging(tokenizer).rows, judged=True))


def make_training(
    context: StageContext, model: Any, rows: Sequence[Any], evaluation: Evaluation, **options: Any
) -> Training:
    """Return the training of ``model`` on ``rows`` with the settings and services of ``context``."""
    return Training(
        model=model,
        rows=rows,
        config=context.config,
        seed=context.seed,
        dtype=context.dtype,
        progress=context.progress,
        stop_requested=context.stop_requested,
        checkpoints=context.checkpoints,
        evaluation=evaluation,
        engine=context.engine,
        **options,
    )


def carry_out(context: StageContext, training: Training) -> Position:
    """Run ``training``; its reach, its eval loss and weights without a gradient go into metrics and warnings.

    Raises:
        Interrupted: A stop was requested; a checkpoint holds the last step.
        Diverged: The loss or the gradient is not finite.
    """
    reach = measure_reach(training.model)
    context.progress.note(reach_note(reach))
    for line in reach_faults(reach, getattr(getattr(context.config, "lora", None), "target_modules", None)):
        context.warn(line)
    position = training.run()
    if idle := training.without_gradient:
        context.metrics["without_gradient"] = weights = sum(idle.values())
        what = f"{len(idle):,} parameters ({weights:,} weights) never got a gradient, such as {min(idle)}"
        context.warn(f"{what}: the model computes nothing of the trained text with them, and they stay as they were")
    context.metrics.update(training.evaluation.figures())
    context.metrics["arithmetic"] = training.compute_dtype
    for line in training.evaluation.warnings():
        context.warn(line)
    return position


def train_answers(
    context: StageContext,
    rows: Sequence[Row],
    loss: AnswerLoss,
    start: Callable[[Sequence[Row], LogProbs], float],
    eval_rows: Sequence[Row],
) -> None:
    """Train the parent's policy on answers and save it; see ``StageContext.train_answers``."""
    config: LoopConfig = context.config
    model = context.policy()
    switch_dropout_off(model)
    check_vocabulary((max([*row.prompt, *ids]) for row in [*rows, *eval_rows] for _, ids in row.answers), model)
    numbered = [Numbered(number, row) for number, row in enumerate([*rows, *eval_rows])]
    first = rows[: config.per_device_batch_size]
    evaluation = AnswerEvaluation(rows=numbered[len(rows) :], refusals=0, config=config)
    training = make_training(
        context,
        model,
        numbered[: len(rows)],
        evaluation,
        make_objective=partial(
            AnswerObjective,
            loss=loss,
            start=Start.of(context.name, model, first, start, context.dtype),
            rows=numbered,
            references=(context.kept or context.checkpoints) / "references",
            parent=context.parent.digest,
            progress=context.progress,
        ),
    )
    evaluation.objective = cast("AnswerObjective[Any]", training.objective)
    position = carry_out(context, training)
    tokens = sum(
        training.objective.totals([training.rows[index] for index in step])["tokens"] for step in training.order
    )
    context.metrics.update(steps=position.step, tokens=tokens, final_loss=position.loss)
    context.metrics.update({name: value for name, value in training.last.items() if name == "rewards_margin"})
    context.save(model)


def check_vocabulary(tokens: Iterable[int], model: Any) -> None:
    """Raise BadInput when one of ``tokens``, given by the tokenizer, is unknown to the model."""
    largest = max(tokens)
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise BadInput(
            Problem(
                where="model.path",
                what=f"the tokenizer gives token {largest}, but the model has only {known} embeddings",
                fix="Use the tokenizer that belongs to the model, or name its new tokens in model.added_tokens",
            )
        )


def switch_dropout_off(model: torch.nn.Module) -> None:
    """Let no dropout of ``model`` drop anything: a policy with dropout would leave its reference before the first step.

    What is saved keeps the parent's settings.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
