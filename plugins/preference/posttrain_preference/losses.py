"""The loss of every method before its first step, where policy and reference are both the SFT model.

Computed from the SFT model's log-probabilities without torch, as the papers write it: training may start only
from this value. A log-probability is in nats, summed over an answer's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain_preference.config import CPOSettings, DPOSettings, KTOSettings, ORPOSettings, SimPOSettings
    from posttrain_preference.feedback import TokenAnswer
    from posttrain_preference.pairs import TokenPair

LogProbs = Sequence[Sequence[float]]
"""Log-probabilities of each row's answers."""
Start = Callable[[Any, Sequence[Any], LogProbs], float]
"""Loss before the first step, from a stage's settings, a batch of rows and their answers' log-probabilities."""

LN_2 = math.log(2)

AT_REFERENCE: Mapping[str, Callable[[float, float], float]] = {
    "sigmoid": lambda beta, smoothing: LN_2,
    "hinge": lambda beta, smoothing: 1.0,
    "ipo": lambda beta, smoothing: 1 / (4 * beta**2),
    "exo_pair": lambda beta, smoothing: -LN_2 - (math.log1p(-smoothing) + math.log(smoothing)) / 2,
    "nca_pair": lambda beta, smoothing: 2 * LN_2,
    "robust": lambda beta, smoothing: LN_2,
    "bco_pair": lambda beta, smoothing: 2 * LN_2,
    "sppo_hard": lambda beta, smoothing: 1 / (2 * beta**2),
    "aot": lambda beta, smoothing: LN_2,
    "aot_unpaired": lambda beta, smoothing: LN_2,
    "apo_zero": lambda beta, smoothing: 1.0,
    "apo_down": lambda beta, smoothing: 1.0,
    "discopop": lambda beta, smoothing: (LN_2 + 1) / 2,
    "sigmoid_norm": lambda beta, smoothing: LN_2,
}
"""Value of each of DPO's losses, from beta and label_smoothing, when every log-probability equals the reference's."""

SFT = "sft"
"""Negative log-likelihood of the chosen answers, per token: no comparison, so no fixed value at the reference."""
NAMES = (*AT_REFERENCE, SFT)
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that read label_smoothing."""
SORTED = ("aot", "aot_unpaired")
"""Losses that sort the log-probability ratios of a batch: in a batch of one they are the sigmoid loss."""


def start_of_dpo(settings: DPOSettings, rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """Return the weighted losses: constants, but for ``sft``, the likelihood of the chosen answers."""
    constant = sum(
        weight * AT_REFERENCE[name](settings.beta, settings.label_smoothing)
        for name, weight in settings.weighted_losses()
        if name != SFT
    )
    return constant + dict(settings.weighted_losses()).get(SFT, 0.0) * _nll(rows, log_probs)


def start_of_kto(settings: KTOSettings, rows: Sequence[TokenAnswer], log_probs: LogProbs) -> float:
    """Return the mean value of the answers: each is worth 1/2, times the weight of its kind."""
    weights = [settings.desirable_weight if row.label else settings.undesirable_weight for row in rows]
    return sum(weights) / (2 * len(rows))


def start_of_orpo(settings: ORPOSettings, rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """Return the likelihood of the chosen answers plus beta times the odds ratio loss of tokens."""
    odds = [
        _log_odds(chosen / len(row.chosen)) - _log_odds(rejected / len(row.rejected))
        for row, (chosen, rejected) in zip(rows, log_probs, strict=True)
    ]
    return _nll(rows, log_probs) + settings.beta * sum(_softplus(-value) for value in odds) / len(rows)


def start_of_cpo(settings: CPOSettings, rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """Return the contrast of both answers plus cpo_alpha times the likelihood of the chosen ones."""
    contrasts = [_contrast(settings, row, *pair) for row, pair in zip(rows, log_probs, strict=True)]
    return sum(contrasts) / len(rows) + settings.cpo_alpha * _nll(rows, log_probs)


def start_of_simpo(settings: SimPOSettings, rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """Return minus the log-sigmoid of the rewards' difference beyond the target margin."""
    margins = [
        settings.beta * (chosen / len(row.chosen) - rejected / len(row.rejected)) - settings.gamma
        for row, (chosen, rejected) in zip(rows, log_probs, strict=True)
    ]
    return sum(_softplus(-margin) for margin in margins) / len(rows)


def _contrast(settings: CPOSettings, row: TokenPair, chosen: float, rejected: float) -> float:
    if settings.loss_type == "ipo":
        return (chosen / len(row.chosen) - rejected / len(row.rejected) - 1 / (2 * settings.beta)) ** 2
    reward = settings.beta * (chosen - rejected)
    if settings.loss_type == "hinge":
        return max(0.0, 1 - reward)
    smoothing = settings.label_smoothing
    return (1 - smoothing) * _softplus(-reward) + smoothing * _softplus(reward)


def _nll(rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """Return the negative log-likelihood of the chosen answers, in nats per token."""
    return -sum(chosen for chosen, _ in log_probs) / sum(len(row.chosen) for row in rows)


def _softplus(value: float) -> float:
    """Return log(1 + exp(value)): minus the logarithm of the sigmoid of ``-value``."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _log_odds(log_prob: float) -> float:
    return log_prob - math.log(-math.expm1(log_prob))
