"""How many documents decide, and what a number of documents can decide. Light: only the standard library."""

from __future__ import annotations

import math
from statistics import NormalDist

from posttrain.gate.statistics import normal_quantile, restricted_spread

POWER = 0.8
"""Chance of deciding that numbers of documents plan for."""


def paired_documents(discordance: float, effect: float, threshold: float, confidence: float) -> int:
    """How many pairs bring Tango's lower bound above ``threshold`` in four of five samples, if ``effect`` is the truth.

    n = ((z_confidence s_0 + z_power s_1) / (effect - threshold))^2, with the spread s_0 of pairs at the threshold, as
    the score test takes it, and s_1 at the truth. Raises ValueError when the effect does not exceed the threshold.
    """
    gap, (win, loss) = effect - threshold, _cells(discordance, effect)
    if gap <= 0:
        raise ValueError(f"an effect of {effect} does not exceed {threshold}")
    if gap >= 1:
        return 1
    at_threshold, at_truth = restricted_spread(win, loss, threshold), math.sqrt(win + loss - effect**2)
    z = normal_quantile(confidence) * at_threshold + normal_quantile(POWER) * at_truth
    # without discordant pairs the bound is -z^2 / (n + z^2), which the spread at the threshold leads to but for one
    return math.ceil((z / gap) ** 2) + 1


def paired_power(n: int, discordance: float, effect: float, threshold: float, confidence: float) -> float:
    """Chance that Tango's lower bound over ``n`` pairs exceeds ``threshold``; see paired_documents."""
    win, loss = _cells(discordance, effect)
    at_threshold, at_truth = restricted_spread(win, loss, threshold), math.sqrt(max(win + loss - effect**2, 0.0))
    distance = (effect - threshold) * math.sqrt(n) - normal_quantile(confidence) * at_threshold
    return NormalDist().cdf(distance / at_truth) if at_truth > 0 else float(distance > 0)


def _cells(discordance: float, effect: float) -> tuple[float, float]:
    """Shares of wins and losses; at least the size of the effect is discordant."""
    discordance = max(discordance, abs(effect))
    return (discordance + effect) / 2, (discordance - effect) / 2
