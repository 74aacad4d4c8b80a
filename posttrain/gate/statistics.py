"""Confidence bounds for the mean difference of paired scores. Imports no torch.

Every bound is one-sided: with ``confidence`` 0.95 the true difference lies above ``low`` in 95 % of samples, and
below ``high`` in 95 % of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

POWER = 0.8
"""Chance of deciding that ``documents_needed`` plans for."""


@dataclass(frozen=True)
class Bounds:
    """Lower and upper one-sided confidence bound of a difference."""

    low: float
    high: float


def tango_bounds(wins: int, losses: int, n: int, confidence: float) -> Bounds:
    """Bounds for the difference of two paired proportions, by inverting Tango's score test.

    ``wins`` of the ``n`` pairs are right only under the new condition, ``losses`` only under the old one. The variance
    is estimated under the hypothesised difference, so that the interval keeps its level when few pairs differ; without
    any discordant pair the bounds are exactly -/+ z^2 / (n + z^2).

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998) 891-908. Raises ValueError when the counts are impossible.
    """
    if n < 1 or wins < 0 or losses < 0 or wins + losses > n:
        raise ValueError(f"impossible counts: {wins} wins and {losses} losses among {n} pairs")
    z = _quantile(confidence)
    return Bounds(_tango_low(wins, losses, n, z), -_tango_low(losses, wins, n, z))


def paired_t_bounds(differences: Sequence[float], scale: float, confidence: float) -> Bounds:
    """Bounds for the mean of paired differences, by Student's t on n - 1 degrees of freedom.

    Source: E. Miller, Adding error bars to evals, arXiv:2411.00640. Differences that are all equal carry no
    estimate of their variance, and would give an interval without width; it gets the width of the score interval
    without discordant pairs instead, -/+ z^2 / (n + z^2), in units of ``scale``: the largest size that a score has.
    """
    n = len(differences)
    if n < 1:
        raise ValueError("no differences")
    mean = fmean(differences)
    if len(set(differences)) == 1:
        z = _quantile(confidence)
        half = z * z / (n + z * z) * scale
    else:
        half = _student_quantile(confidence, n - 1) * stdev(differences) / math.sqrt(n)
    return Bounds(mean - half, mean + half)


def paired_bounds(new: Sequence[float], old: Sequence[float], confidence: float) -> Bounds:
    """Bounds for the mean of ``new - old``, pair by pair: Tango's when every score is 0 or 1, Student's t otherwise."""
    pairs = list(zip(new, old, strict=True))
    if is_binary(new) and is_binary(old):
        wins = sum(1 for after, before in pairs if after > before)
        losses = sum(1 for after, before in pairs if after < before)
        return tango_bounds(wins, losses, len(pairs), confidence)
    scale = max(abs(score) for pair in pairs for score in pair)
    return paired_t_bounds([after - before for after, before in pairs], scale, confidence)


def is_binary(scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return set(scores) <= {0.0, 1.0}


def documents_needed(differences: Sequence[float], threshold: float, confidence: float) -> int | None:
    """How many documents would lift the lower bound over ``threshold`` in four of five samples.

    Takes the observed mean and variance for the true ones: n = (z_confidence + z_power)^2 s^2 / (mean - threshold)^2.
    None when the observed mean does not exceed the threshold, so that no number would do.
    """
    gap = fmean(differences) - threshold
    if gap <= 0:
        return None
    z = _quantile(confidence)
    if len(set(differences)) == 1:
        return math.ceil(z * z * (1 - gap) / gap) + 1 if gap < 1 else 1
    return math.ceil(((z + _quantile(POWER)) * stdev(differences) / gap) ** 2)


def _tango_low(wins: int, losses: int, n: int, z: float) -> float:
    """The difference at which the score statistic equals ``z``: the statistic falls as the difference grows."""
    if wins == losses == 0:
        return -z * z / (n + z * z)
    low, high = -1.0, (wins - losses) / n
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return low
        if _tango_statistic(wins, losses, n, middle) > z:
            low = middle
        else:
            high = middle


def _tango_statistic(wins: int, losses: int, n: int, difference: float) -> float:
    """Score statistic of a hypothesised difference in the open interval (-1, 1)."""
    # The maximum-likelihood probability of a loss, given the difference, is the larger root of a q^2 + b q + c = 0.
    a = 2 * n
    b = (2 * n - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    loss = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * loss + difference * (1 - difference))
    distance = wins - losses - n * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def _quantile(confidence: float) -> float:
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must lie in [0.5, 1), not {confidence}")
    return NormalDist().inv_cdf(confidence)


def _student_quantile(confidence: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, confidence))
