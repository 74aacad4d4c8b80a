"""Preference training from start to end: render, train from the parent or the newest checkpoint, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from posttrain import StageContext
from posttrain_preference.advice import ADVICE, Known
from posttrain_preference.feedback import render_feedback
from posttrain_preference.methods import METHODS
from posttrain_preference.pairs import render_pairs
from posttrain_preference.rows import TokenRows

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
    rows = RENDER[method.records](context)
    from posttrain_preference import objectives  # imports torch, and listing the stages must not

    loss = getattr(objectives, method.loss)(context.config)
    context.metrics.update(rows.figures())
    for line in ADVICE.departures(context.config, Known.of(rows, adapter=context.parent.adapter is not None)):
        context.warn(line)
    context.train_answers(rows.rows, loss, partial(method.start, context.config), rows.eval_rows)
