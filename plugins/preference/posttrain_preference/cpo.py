"""Contrastive preference optimisation (arXiv:2401.08417), stacked on the SFT artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain import StageContext
from posttrain_preference.config import CPOSettings
from posttrain_preference.dpo import nll
from posttrain_preference.orpo import softplus
from posttrain_preference.pairs import TokenPair, render_pairs
from posttrain_preference.stage import Build, train

if TYPE_CHECKING:
    from posttrain_preference.reference import LogProbs


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, towards the chosen answers, without a reference.

    Continues from the newest checkpoint in ``context.checkpoints``. Raises BadInput when no pair can be trained on,
    ArtifactDamaged when the policy is not the SFT model, Interrupted when the run was asked to stop.
    """
    train(context, render_pairs, trainer, start, referenced=False)


def trainer() -> Build:
    """What makes TRL's trainer; importing it takes seconds."""
    from posttrain_preference.free_trainer import build_cpo

    return build_cpo


def start(settings: CPOSettings, rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """The contrast of chosen and rejected answers plus cpo_alpha times the likelihood of the chosen ones."""
    contrasts = [_contrast(settings, row, *pair) for row, pair in zip(rows, log_probs, strict=True)]
    return sum(contrasts) / len(rows) + settings.cpo_alpha * nll(rows, log_probs)


def _contrast(settings: CPOSettings, row: TokenPair, chosen: float, rejected: float) -> float:
    if settings.loss_type == "ipo":
        return (chosen / len(row.chosen) - rejected / len(row.rejected) - 1 / (2 * settings.beta)) ** 2
    reward = settings.beta * (chosen - rejected)
    if settings.loss_type == "hinge":
        return max(0.0, 1 - reward)
    smoothing = settings.label_smoothing
    return (1 - smoothing) * softplus(-reward) + smoothing * softplus(reward)
