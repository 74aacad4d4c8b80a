"""Odds ratio preference optimisation (arXiv:2403.07691), stacked on the SFT artifact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain import StageContext
from posttrain_preference.config import ORPOSettings
from posttrain_preference.dpo import nll
from posttrain_preference.pairs import TokenPair, render_pairs
from posttrain_preference.stage import Build, train

if TYPE_CHECKING:
    from posttrain_preference.reference import LogProbs


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, on the chosen answers and on their odds over the rejected ones.

    Continues from the newest checkpoint in ``context.checkpoints``. Raises BadInput when no pair can be trained on,
    ArtifactDamaged when the policy is not the SFT model, Interrupted when the run was asked to stop.
    """
    train(context, render_pairs, trainer, start, referenced=False)


def trainer() -> Build:
    """What makes TRL's trainer; importing it takes seconds."""
    from posttrain_preference.free_trainer import build_orpo

    return build_orpo


def start(settings: ORPOSettings, rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """Likelihood of the chosen answers plus beta times the odds ratio loss, from log-probabilities per token."""
    odds = [
        _log_odds(chosen / len(row.chosen)) - _log_odds(rejected / len(row.rejected))
        for row, (chosen, rejected) in zip(rows, log_probs, strict=True)
    ]
    return nll(rows, log_probs) + settings.beta * sum(softplus(-value) for value in odds) / len(rows)


def softplus(value: float) -> float:
    """log(1 + exp(value)), which is minus the logarithm of the sigmoid of ``-value``."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _log_odds(log_prob: float) -> float:
    return log_prob - math.log(-math.expm1(log_prob))
