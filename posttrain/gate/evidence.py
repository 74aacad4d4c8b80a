"""The evidence in a task's scores: a mean with its bounds, oriented so that more is better. Imports no torch.

The scores choose the interval: Tango's for paired answers that are right or wrong, Clopper and Pearson's for a share of
right answers against a threshold, Student's t with Hall's correction for skewness for every other mean, over clusters
where documents share a source. A pool of tasks combines the bounds of each. The usual normal interval would err where
gates are used: with few discordant answers, shares near 0 or 1, and rare large losses (tables in docs/gates.md).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Protocol

from posttrain.gate.statistics import (
    POWER,
    Bounds,
    MeanError,
    equal_documents,
    exact_share_bounds,
    mean_bounds,
    mean_error,
    normal_quantile,
    paired_documents,
    tango_bounds,
)

RESAMPLES = 2000
RESAMPLED_AT_ONCE = 50
"""Resamples held in memory at once: 6 MB for 14,000 documents."""


class Evidence(Protocol):
    """A mean over documents: of differences between two systems, or of distances from a threshold."""

    @property
    def n(self) -> int:
        """Number of documents."""

    @property
    def mean(self) -> float:
        """The observed mean."""

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; 0 when nothing differs."""

    @property
    def method(self) -> str:
        """Name of the interval behind the bounds."""

    def bounds(self, confidence: float) -> Bounds:
        """Return one-sided bounds of the mean."""

    def documents(self, expected: float, threshold: float, confidence: float) -> int:
        """Return the number of documents that bring the lower bound above ``threshold`` in four of five samples.

        Takes ``expected`` > ``threshold`` for the true mean, and the observed spread for the true one.
        """


@dataclass(frozen=True)
class PairedAnswers:
    """Answers that are right or wrong, from two systems."""

    wins: int
    """Documents answered right by the new system alone."""
    losses: int
    """Documents answered right by the old system alone."""
    n: int

    method = "Tango's score interval"

    @property
    def mean(self) -> float:
        """Difference of the shares of right answers."""
        return (self.wins - self.losses) / self.n

    @property
    def standard_error(self) -> float:
        """Standard error of the difference, from the discordant pairs."""
        return math.sqrt(((self.wins + self.losses) / self.n - self.mean**2) / self.n)

    def bounds(self, confidence: float) -> Bounds:
        """Return Tango's bounds of the difference."""
        return tango_bounds(self.wins, self.losses, self.n, confidence)

    def documents(self, expected: float, threshold: float, confidence: float) -> int:
        """Return the number of documents, from the observed discordance."""
        return paired_documents((self.wins + self.losses) / self.n, expected, threshold, confidence)


@dataclass(frozen=True)
class RightAnswers:
    """Right and wrong answers of one system, set against a threshold; ``right`` counts the wanted ones."""

    right: int
    n: int
    threshold: float

    method = "Clopper and Pearson's exact interval"

    @property
    def mean(self) -> float:
        """Distance of the share from the threshold."""
        return self.right / self.n - self.threshold

    @property
    def standard_error(self) -> float:
        """Standard error of the share: binomial."""
        share = self.right / self.n
        return math.sqrt(share * (1 - share) / self.n)

    def bounds(self, confidence: float) -> Bounds:
        """Return exact bounds of the distance."""
        bounds = exact_share_bounds(self.right, self.n, confidence)
        return Bounds(bounds.low - self.threshold, bounds.high - self.threshold)

    def documents(self, expected: float, threshold: float, confidence: float) -> int:
        """Return the number of documents, from the observed spread if there is any."""
        gap = expected - threshold
        if needed := _documents(self, gap, confidence):
            return needed
        # Without a wrong answer the exact bound is the n-th root of the error.
        return math.ceil(math.log(1 - confidence) / math.log(1 - gap)) + 1 if gap < 1 else 1


@dataclass(frozen=True)
class Mean:
    """Values of any size, one per document."""

    values: Sequence[float]
    scale: float
    """Largest absolute score: the unit of the bounds of values that are all equal."""
    clusters: Sequence[Hashable] | None = None
    """The source of each document, where documents share sources."""

    @property
    def n(self) -> int:
        """Number of documents."""
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        """Mean of the values."""
        return fmean(self.values)

    @cached_property
    def error(self) -> MeanError:
        """Error of the mean, over clusters if there are any."""
        return mean_error(self.values, self.clusters)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, over clusters if there are any."""
        return self.error.standard

    @property
    def method(self) -> str:
        """Name of the interval, with the number of clusters if there are any."""
        clusters = "" if self.clusters is None else f" over {self.error.groups:,} clusters"
        return f"Student's t{clusters}, corrected for skewness"

    def bounds(self, confidence: float) -> Bounds:
        """Return bounds by Student's t, corrected for skewness; a single cluster counts like a single document."""
        return mean_bounds(self.mean, self.error, self.scale, confidence)

    def documents(self, expected: float, threshold: float, confidence: float) -> int:
        """Return the number of documents, with as many for each source as now."""
        gap, per_group = expected - threshold, self.n / self.error.groups
        needed = _documents(self, gap, confidence)
        return needed or math.ceil(per_group * equal_documents(gap, self.scale, confidence))

    def bootstrap(self, confidence: float, seed: int) -> Bounds | None:
        """Return bias-corrected and accelerated bootstrap bounds, drawing clusters; None when no value differs.

        They do not decide: in small samples they err more often than the bounds that do (docs/gates.md).

        Source: B. Efron, Better bootstrap confidence intervals, JASA 82 (1987) 171-185.
        """
        import numpy as np
        from scipy.stats import bootstrap

        if self.standard_error == 0:
            return None
        sums: dict[Hashable, list[float]] = {}
        for value, cluster in zip(self.values, self.clusters or range(self.n), strict=True):
            total = sums.setdefault(cluster, [0.0, 0.0])
            total[0] += value
            total[1] += 1
        found = bootstrap(
            tuple(np.array(list(sums.values())).T),
            lambda totals, counts, axis=-1: totals.sum(axis=axis) / counts.sum(axis=axis),
            paired=True, vectorized=True, confidence_level=2 * confidence - 1, method="BCa",
            n_resamples=RESAMPLES, batch=RESAMPLED_AT_ONCE, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        return Bounds(float(found.low), float(found.high))


@dataclass(frozen=True)
class Pool:
    """Tasks taken together, each with the same weight."""

    parts: Sequence[Evidence]
    correlations: Sequence[Sequence[float]] | None = None
    """The largest correlation between the means of two parts, from the documents in both; None for none at all."""

    @property
    def n(self) -> int:
        """Number of documents of all tasks."""
        return sum(part.n for part in self.parts)

    @property
    def mean(self) -> float:
        """Mean of the tasks' means."""
        return fmean(part.mean for part in self.parts)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean of the tasks."""
        return self._combine([part.standard_error for part in self.parts])

    @property
    def method(self) -> str:
        """Name of the interval, with the number of tasks."""
        count = len(self.parts)
        return f"{count} task{'s' if count > 1 else ''} with equal weight, their bounds combined"

    def bounds(self, confidence: float) -> Bounds:
        """Return bounds from the tasks' own: distances from means to bounds add like errors, in squares.

        Tasks that share documents err together, at most as far as the documents are the same.
        So the care of Tango's interval for few discordant documents reaches the pool. Source: G. Y. Zou, J. Huang, X.
        Zhang, A note on confidence interval estimation for a linear function of binomial proportions, Computational
        Statistics & Data Analysis 53 (2009) 1080-1085.
        """
        found = [(part.mean, part.bounds(confidence)) for part in self.parts]
        below = self._combine([mean - bounds.low for mean, bounds in found])
        above = self._combine([bounds.high - mean for mean, bounds in found])
        return Bounds(self.mean - below, self.mean + above)

    def documents(self, expected: float, threshold: float, confidence: float) -> int:
        """Return the number of documents of all tasks, in today's proportions."""
        needed = _documents(self, expected - threshold, confidence)
        return needed or sum(part.documents(expected, threshold, confidence) for part in self.parts)

    def _combine(self, distances: Sequence[float]) -> float:
        """Return the error of the mean of the parts from their own errors."""
        if self.correlations is None:
            return math.hypot(*distances) / len(distances)
        pairs = zip(distances, self.correlations, strict=True)
        squares = (one * other * r for one, row in pairs for other, r in zip(distances, row, strict=True))
        return math.sqrt(max(math.fsum(squares), 0.0)) / len(distances)


def pair_scores(new: Sequence[float], old: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Evidence:
    """Pair two systems' scores of the same documents; ``clusters`` name the source of each.

    Raises ValueError when the numbers of scores differ.
    """
    pairs = list(zip(new, old, strict=True))
    clusters = _shared(clusters)
    if clusters is None and is_binary(new) and is_binary(old):
        wins = sum(1 for after, before in pairs if after > before)
        return PairedAnswers(wins, sum(1 for after, before in pairs if after < before), len(pairs))
    scale = max(abs(score) for pair in pairs for score in pair)
    return Mean([after - before for after, before in pairs], scale, clusters)


def measure_distance(
    scores: Sequence[float], threshold: float, *, higher_is_better: bool, clusters: Sequence[Hashable] | None = None
) -> Evidence:
    """Measure how far one system's scores lie on the good side of ``threshold``."""
    clusters = _shared(clusters)
    if clusters is None and is_binary(scores):
        right = sum(score == float(higher_is_better) for score in scores)
        return RightAnswers(right, len(scores), threshold if higher_is_better else 1 - threshold)
    sign = 1 if higher_is_better else -1
    return Mean([sign * (score - threshold) for score in scores], max(map(abs, (*scores, threshold))), clusters)


def is_binary(scores: Sequence[float]) -> bool:
    """Return whether every score is 0 or 1."""
    return set(scores) <= {0.0, 1.0}


def _shared(clusters: Sequence[Hashable] | None) -> Sequence[Hashable] | None:
    """Return the clusters; None when every document has its own, and so is independent."""
    return clusters if clusters is not None and len(set(clusters)) < len(clusters) else None


def _documents(evidence: Evidence, gap: float, confidence: float) -> int:
    """Return n ((z_confidence + z_power) standard error / gap)^2; 0 when the evidence holds no variance."""
    z = normal_quantile(confidence) + normal_quantile(POWER)
    return math.ceil(evidence.n * (z * evidence.standard_error / gap) ** 2)
