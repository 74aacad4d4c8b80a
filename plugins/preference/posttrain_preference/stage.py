"""What every preference stage does: prove its start, train from the newest checkpoint, save in the parent's format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from posttrain import Interrupted, StageContext
from posttrain_preference.quiet import muted, quiet
from posttrain_preference.rows import TokenRows

if TYPE_CHECKING:
    from posttrain_preference.reference import Start
    from posttrain_preference.trainer import StageTrainer

Build = Callable[[StageContext, TokenRows[Any], Any, Any], "StageTrainer"]
"""Makes the trainer from context, rows, policy, and the reference model or None."""


def train(
    context: StageContext,
    render: Callable[[StageContext], TokenRows[Any]],
    trainer: Callable[[], Build],
    start: Start,
    *,
    referenced: bool,
) -> None:
    """Train the parent's adapter, or its full weights, on the stage's records and save the result.

    Args:
        context: The stage's context; training goes on from the newest checkpoint in it.
        render: Makes token ids of the context's records.
        trainer: Imports what makes the trainer.
        start: The loss that training has to start with.
        referenced: Whether the loss compares the policy with a frozen copy of where it started.

    Raises:
        BadInput: No record can be trained on.
        ArtifactDamaged: The policy or the reference is not the SFT model.
        Interrupted: The run was asked to stop.
    """
    with quiet():
        with muted():
            build = trainer()
        _train(context, render(context), build, start, referenced=referenced)


def _train(context: StageContext, rows: TokenRows[Any], build: Build, start: Start, *, referenced: bool) -> None:
    from posttrain_preference.reference import frozen_copy, prove_start, row_log_probs
    from posttrain_preference.trainer import uses_autocast

    policy = context.policy()
    configs = [(holder, name, copy.deepcopy(value)) for holder, name, value in _configs(policy)]
    first = rows.rows[: context.config.per_device_batch_size]
    expected = row_log_probs(policy, first, uses_autocast(context, policy))
    trainer = build(context, rows, policy, frozen_copy(policy) if referenced else None)
    prove_start(trainer, first, expected, context, start)
    _run(context, trainer)
    for holder, name, value in configs:  # TRL adapts them to training; the artifact keeps the parent's
        setattr(holder, name, value)
    context.metrics.update(rows.figures() | trainer.figures())
    context.save(policy)


def _run(context: StageContext, trainer: StageTrainer) -> None:
    from posttrain_preference import checkpoint

    resumed = checkpoint.newest(context.checkpoints, context.progress.note)
    trainer.train(resume_from_checkpoint=resumed and str(resumed))
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"{context.name} was stopped after step {trainer.state.global_step}; its checkpoint is kept")


def _configs(policy: Any) -> list[tuple[Any, str, Any]]:
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    return [(model, name, getattr(model, name)) for name in ("config", "generation_config")]
