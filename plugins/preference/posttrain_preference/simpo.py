"""Simple preference optimisation (arXiv:2405.14734), stacked on the SFT artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain import StageContext
from posttrain_preference.config import SimPOSettings
from posttrain_preference.orpo import softplus
from posttrain_preference.pairs import TokenPair, render_pairs
from posttrain_preference.stage import Build, train

if TYPE_CHECKING:
    from posttrain_preference.reference import LogProbs


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, until chosen answers are likelier per token by a margin.

    Continues from the newest checkpoint in ``context.checkpoints``. Raises BadInput when no pair can be trained on,
    ArtifactDamaged when the policy is not the SFT model, Interrupted when the run was asked to stop.
    """
    train(context, render_pairs, trainer, start, referenced=False)


def trainer() -> Build:
    """What makes TRL's trainer; importing it takes seconds."""
    from posttrain_preference.free_trainer import build_simpo

    return build_simpo


def start(settings: SimPOSettings, rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """Minus the log-sigmoid of the difference in reward beyond the target margin."""
    margins = [
        settings.beta * (chosen / len(row.chosen) - rejected / len(row.rejected)) - settings.gamma
        for row, (chosen, rejected) in zip(rows, log_probs, strict=True)
    ]
    return sum(softplus(-margin) for margin in margins) / len(rows)
