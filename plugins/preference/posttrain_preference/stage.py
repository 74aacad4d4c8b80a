"""Preference training from start to end: prove the start, train from the newest checkpoint, save."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from posttrain import Interrupted, StageContext
from posttrain_preference.feedback import render_feedback
from posttrain_preference.methods import METHODS, Method
from posttrain_preference.pairs import render_pairs
from posttrain_preference.quiet import muted, quiet
from posttrain_preference.rows import TokenRows

if TYPE_CHECKING:
    from posttrain_preference.trainer import StageTrainer

RENDER: Mapping[str, Callable[[StageContext], TokenRows[Any]]] = {
    "preferences": render_pairs,
    "feedback": render_feedback,
}
"""Rendering of each shape of records."""


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, with the method of the stage's kind, and save the result.

    Training resumes from the newest checkpoint in ``context.checkpoints``.

    Raises:
        BadInput: No record can be trained on.
        ArtifactDamaged: The policy or the reference is not the SFT model, or training diverged.
        Interrupted: The run was asked to stop.
    """
    method = METHODS[context.config.kind]
    with quiet():
        with muted():  # some libraries print while they are imported
            from posttrain_preference import trainer
        _train(context, method, getattr(trainer, method.trainer), RENDER[method.records](context))


def _train(context: StageContext, method: Method, kind: type[StageTrainer], rows: TokenRows[Any]) -> None:
    from posttrain_preference.reference import frozen_copy, prove_start, row_log_probs
    from posttrain_preference.trainer import build_trainer, uses_autocast

    policy = context.policy()
    configs = [(holder, name, copy.deepcopy(value)) for holder, name, value in _configs(policy)]
    _leave_routers_alone(policy)
    first = rows.rows[: context.config.per_device_batch_size]
    expected = row_log_probs(policy, first, uses_autocast(context, policy))
    trainer = build_trainer(kind, context, rows, policy, frozen_copy(policy) if method.referenced else None)
    prove_start(trainer, first, expected, context, method.start)
    _take_steps(context, trainer)
    for holder, name, value in configs:  # TRL adapts them to training; the artifact keeps the parent's
        setattr(holder, name, value)
    context.metrics.update(rows.figures() | trainer.figures())
    context.save(policy)


def _take_steps(context: StageContext, trainer: StageTrainer) -> None:
    from posttrain_preference.checkpoint import find_newest

    newest = find_newest(context.checkpoints, context.progress.note)
    trainer.train(resume_from_checkpoint=newest and str(newest))
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"{context.name} was stopped after step {trainer.state.global_step}; its checkpoint is kept")


def _leave_routers_alone(policy: Any) -> None:
    """Let a mixture of experts return no router logits: TRL would add its loss of balance to that of the answers.

    SFT adds none either. The loss is meant for experts that are still empty; here it would pull the policy away from
    the SFT model even where every answer is right, and no start could be proven.
    """
    config = _configs(policy)[0][2].get_text_config()
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def _configs(policy: Any) -> list[tuple[Any, str, Any]]:
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    return [(model, name, getattr(model, name)) for name in ("config", "generation_config")]
