"""Kahneman-Tversky optimisation (arXiv:2402.01306): answers judged good or bad, stacked on the SFT artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain import StageContext
from posttrain_preference.config import KTOSettings
from posttrain_preference.feedback import TokenAnswer, render_feedback
from posttrain_preference.stage import Build, train

if TYPE_CHECKING:
    from posttrain_preference.reference import LogProbs


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, towards the good answers and away from the bad ones.

    Continues from the newest checkpoint in ``context.checkpoints``. Raises BadInput when all answers were judged alike
    or none can be trained on, ArtifactDamaged when the reference is not the SFT model, Interrupted when the run was
    asked to stop.
    """
    train(context, render_feedback, trainer, start, referenced=True)


def trainer() -> Build:
    """What makes TRL's trainer; importing it takes seconds."""
    from posttrain_preference.kto_trainer import build

    return build


def start(settings: KTOSettings, rows: Sequence[TokenAnswer], log_probs: LogProbs) -> float:
    """The loss where policy and reference agree: every answer has value 1/2, times the weight of its kind."""
    weights = [settings.desirable_weight if row.label else settings.undesirable_weight for row in rows]
    return sum(weights) / (2 * len(rows))
