"""Confidence bounds of means, shares and paired differences; several claims at once; power. Imports no torch.

Every bound is one-sided: with ``confidence`` 0.95 the true value lies above ``low`` in 95 % of samples, and below
``high`` in 95 % of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

POWER = 0.8
"""Chance of deciding, in every number of documents that is planned for."""
LowAt = Callable[[float], float]
"""Lower bound as a function of the one-sided confidence; it falls as the confidence grows."""


@dataclass(frozen=True)
class Bounds:
    """Lower and upper one-sided confidence bound."""

    low: float
    high: float


def tango_bounds(wins: int, losses: int, n: int, confidence: float) -> Bounds:
    """Return bounds for the difference of two paired proportions, by inverting Tango's score test.

    ``wins`` of the ``n`` pairs are right only under the new condition, ``losses`` only under the old one. The variance
    is estimated under the hypothesised difference, so that the interval keeps its level when few pairs differ; without
    any discordant pair the bounds are exactly -/+ z^2 / (n + z^2).

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998) 891-908. Raises ValueError when the counts are impossible.
    """
    if n < 1 or wins < 0 or losses < 0 or wins + losses > n:
        raise ValueError(f"impossible counts: {wins} wins and {losses} losses among {n} pairs")
    z = normal_quantile(confidence)
    return Bounds(_tango_low(wins, losses, n, z), -_tango_low(losses, wins, n, z))


def exact_share_bounds(right: int, n: int, confidence: float) -> Bounds:
    """Return exact bounds for a share, from ``right`` of ``n`` documents; they never err more often than promised.

    Source: C. J. Clopper, E. S. Pearson, Biometrika 26 (1934) 404-413. Raises ValueError when the counts are
    impossible.
    """
    from scipy.special import betaincinv

    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"impossible counts: {right} right among {n} documents")
    error = 1 - _checked(confidence)
    low = betaincinv(right, n - right + 1, error) if right else 0.0
    high = betaincinv(right + 1, n - right, 1 - error) if right < n else 1.0
    return Bounds(float(low), float(high))


@dataclass(frozen=True)
class MeanError:
    """The uncertainty of a mean."""

    standard: float
    """Standard error; 0 when the values hold no variance."""
    skewness: float
    """Skewness of the independent groups' contributions."""
    groups: int
    """Number of independent groups of values."""


def mean_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> MeanError:
    """Return the error of the mean of ``values``; values of one cluster may depend on each other.

    With residual sums u_g over the values of cluster g, the variance is G / (G - 1) sum u_g^2 / n^2. Without clusters
    every value is its own, and this is the usual s^2 / n. Sources: E. Miller, Adding error bars to evals,
    arXiv:2411.00640; A. C. Cameron, D. L. Miller, A practitioner's guide to cluster-robust inference, Journal of Human
    Resources 50 (2015) 317-372, equation 12.
    """
    mean = fmean(values)
    residuals: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, range(len(values)) if clusters is None else clusters, strict=True):
        residuals.setdefault(cluster, []).append(value - mean)
    groups, sums = len(residuals), [math.fsum(found) for found in residuals.values()]
    squares = math.fsum(found**2 for found in sums)
    if groups == 1 or len(set(values)) == 1 or squares == 0:
        return MeanError(0.0, 0.0, groups)
    skewness = math.fsum(found**3 for found in sums) / groups / (squares / groups) ** 1.5
    return MeanError(math.sqrt(groups / (groups - 1) * squares) / len(values), skewness, groups)


def mean_bounds(mean: float, error: MeanError, scale: float, confidence: float) -> Bounds:
    """Return bounds for a mean by Student's t on G - 1 degrees of freedom, wider where the values are skewed.

    The t interval errs when values are skewed: with rare large losses its lower bound lies too high. Hall's
    transformation takes the skewness out; either bound is the wider one of both, because the transformation alone errs
    for symmetric values with heavy tails. Source: P. Hall, On the removal of skewness by transformation, JRSS B 54
    (1992) 221-228.

    Values that are all equal carry no estimate of their variance, and would give an interval without width; it gets
    the width of the score interval without discordant pairs instead, -/+ z^2 / (n + z^2), in units of ``scale``: the
    largest size that a score has. Towards 0 it is wider, the more the larger the value is, up to the score interval of
    pairs that are all won: however large the gain of a single document, it is not told from 0.
    """
    if error.standard == 0:
        half = equal_half_width(error.groups, confidence) * scale
        size = min(abs(mean) / scale, 1.0) if scale > 0 else 0.0
        won = tango_bounds(error.groups, 0, error.groups, confidence).low
        towards = (1 - size) * half + size * (1 - won) * scale
        below, above = (towards, half) if mean > 0 else (half, towards)
        return Bounds(mean - below, mean + above)
    t, root = _student_quantile(confidence, error.groups - 1), math.sqrt(error.groups)
    below = max(t, root * _unskewed(t / root, error.skewness, error.groups))
    above = max(t, root * _unskewed(t / root, -error.skewness, error.groups))
    return Bounds(mean - below * error.standard, mean + above * error.standard)


def _unskewed(quantile: float, skewness: float, groups: int) -> float:
    """Invert Hall's transformation w + s w^2 / 3 + s^2 w^3 / 27 + s / (6 G) at ``quantile``."""
    # the closed form divides by the skewness
    if abs(skewness) < 1e-6:
        return quantile
    return 3 / skewness * (math.cbrt(1 + skewness * (quantile - skewness / (6 * groups))) - 1)


def equal_half_width(n: int, confidence: float) -> float:
    """Return the distance from a paired difference to its bound when all of the ``n`` pairs are equal."""
    z = normal_quantile(confidence)
    return z * z / (n + z * z)


def equal_documents(gap: float, scale: float, confidence: float) -> int:
    """Return the number of equal pairs that bring that distance below ``gap``."""
    z = normal_quantile(confidence)
    return math.ceil(z * z * (scale - gap) / gap) + 1 if gap < scale else 1


def restricted_spread(win: float, loss: float, difference: float) -> float:
    """Return a pair's standard deviation under a hypothesised difference, given the observed shares.

    The most likely share of losses, given the difference, is the larger root of 2 q^2 + b q + c = 0.
    """
    b = (2 - win + loss) * difference - win - loss
    c = -loss * difference * (1 - difference)
    most_likely = (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4
    return math.sqrt(max(2 * most_likely + difference * (1 - difference), 0.0))


@dataclass(frozen=True)
class Claim:
    """The answer about one of several lifts."""

    passed: bool
    low: float
    """Adjusted lower bound of a claimed lift: above its threshold, or at it while another lift is open."""


def holm(lows: Sequence[LowAt], thresholds: Sequence[float], confidence: float) -> list[Claim]:
    """Decide about several lifts at once: the chance of any false claim stays below the error of a single one.

    A lift is claimed, and open no longer, when it exceeds its threshold at the error divided by the number of open
    lifts. All true lifts lie above the adjusted bounds at once with ``confidence``. An open lift has its bound at the
    error divided by the number of open ones; a claimed one has its threshold until all are claimed. Sources: S. Holm, A
    simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979) 65-70; K.
    Strassburger, F. Bretz, Compatible simultaneous lower confidence bounds for the Holm procedure and other
    Bonferroni-based closed tests, Statistics in Medicine 27 (2008) 4914-4927.
    """
    error = 1 - confidence
    unclaimed = set(range(len(lows)))
    while claimed := {i for i in unclaimed if lows[i](1 - error / len(unclaimed)) > thresholds[i]}:
        unclaimed -= claimed

    def adjusted(i: int) -> float:
        if i in unclaimed:
            return lows[i](1 - error / len(unclaimed))
        return thresholds[i] if unclaimed else max(thresholds[i], lows[i](1 - error / len(lows)))

    return [Claim(i not in unclaimed, adjusted(i)) for i in range(len(lows))]


def paired_documents(discordance: float, effect: float, threshold: float, confidence: float) -> int:
    """Return the number of pairs that bring Tango's lower bound above ``threshold`` in four of five samples.

    n = ((z_confidence s_0 + z_power s_1) / (effect - threshold))^2, with the spread s_0 of pairs at the threshold, as
    the score test takes it, and s_1 at the truth, ``effect``. Raises ValueError when the effect does not exceed the
    threshold.
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
    """Return the chance that Tango's lower bound over ``n`` pairs exceeds ``threshold``; see paired_documents."""
    win, loss = _cells(discordance, effect)
    at_threshold, at_truth = restricted_spread(win, loss, threshold), math.sqrt(max(win + loss - effect**2, 0.0))
    distance = (effect - threshold) * math.sqrt(n) - normal_quantile(confidence) * at_threshold
    return NormalDist().cdf(distance / at_truth) if at_truth > 0 else float(distance > 0)


def _cells(discordance: float, effect: float) -> tuple[float, float]:
    """Return the shares of wins and losses; at least the size of the effect is discordant."""
    discordance = max(discordance, abs(effect))
    return (discordance + effect) / 2, (discordance - effect) / 2


def normal_quantile(confidence: float) -> float:
    """Return the standard normal quantile of a one-sided confidence. Raises ValueError outside [0.5, 1)."""
    return NormalDist().inv_cdf(_checked(confidence))


def _checked(confidence: float) -> float:
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must lie in [0.5, 1), not {confidence}")
    return confidence


def _student_quantile(confidence: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, _checked(confidence)))


def _tango_low(wins: int, losses: int, n: int, z: float) -> float:
    """Return the difference at which the score statistic, which falls as the difference grows, equals ``z``."""
    # bisect until no float lies between: the bound is exact, and its rounding is on the safe side
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
    """Return the score statistic of a hypothesised difference in the open interval (-1, 1)."""
    spread = restricted_spread(wins / n, losses / n, difference)
    distance = wins - losses - n * difference
    return distance / math.sqrt(n) / spread if spread > 0 else math.copysign(math.inf, distance)
