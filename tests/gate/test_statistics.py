"""Bounds of paired differences: published values, an independent solution, calibration."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from posttrain.gate.statistics import Bounds, exact_share_bounds, mean_bounds, mean_error, tango_bounds

TWO_SIDED_95 = 0.975


@pytest.mark.parametrize(
    ("wins", "losses", "n", "low", "high"),
    [
        # Airway hyper-responsiveness, (1, 1, 7, 12): Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014) 2850.
        (1, 7, 21, -0.517, -0.026),
        # Complete response, (59, 6, 16, 80): the same, Statistical Analysis of Contingency Tables (2017), chapter 8.
        (6, 16, 161, -0.124, -0.005),
    ],
)
def test_published_intervals(wins: int, losses: int, n: int, low: float, high: float) -> None:
    bounds = tango_bounds(wins, losses, n, TWO_SIDED_95)
    assert (round(bounds.low, 3), round(bounds.high, 3)) == (low, high)


def score_statistic(wins: int, losses: int, n: int, difference: float) -> float:
    """Tango's statistic with the restricted estimate found by maximising the likelihood numerically."""

    def unlikely(loss: float) -> float:
        cells = ((wins, loss + difference), (losses, loss), (n - wins - losses, 1 - 2 * loss - difference))
        return -sum(count * math.log(chance) for count, chance in cells if count)

    least, most = max(0.0, -difference), (1 - difference) / 2
    edge = 1e-12
    loss = optimize.minimize_scalar(
        unlikely, bounds=(least + edge, most - edge), method="bounded", options={"xatol": 1e-13}
    ).x
    return (wins - losses - n * difference) / math.sqrt(n * (2 * loss + difference - difference**2))


@pytest.mark.parametrize(("wins", "losses", "n"), [(1, 7, 21), (3, 2, 10), (40, 20, 160), (5, 1, 400), (12, 12, 60)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_score_equation_holds_at_the_bounds(wins: int, losses: int, n: int, confidence: float) -> None:
    bounds = tango_bounds(wins, losses, n, confidence)
    z = stats.norm.ppf(confidence)
    assert score_statistic(wins, losses, n, bounds.low) == pytest.approx(z, abs=1e-4)
    assert score_statistic(wins, losses, n, bounds.high) == pytest.approx(-z, abs=1e-4)


@pytest.mark.parametrize("n", [1, 10, 1319])
def test_without_discordance_the_bounds_are_exact(n: int) -> None:
    z = stats.norm.ppf(0.95)
    assert tango_bounds(0, 0, n, 0.95) == Bounds(
        pytest.approx(-z * z / (n + z * z)), pytest.approx(z * z / (n + z * z))
    )


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    n = draw(st.integers(1, 3000))
    wins = draw(st.integers(0, n))
    return wins, draw(st.integers(0, n - wins)), n


@given(counts(), st.floats(0.6, 0.999))
@settings(max_examples=200, deadline=None)
def test_bounds_enclose_the_estimate_and_mirror(table: tuple[int, int, int], confidence: float) -> None:
    wins, losses, n = table
    bounds = tango_bounds(wins, losses, n, confidence)
    mirrored = tango_bounds(losses, wins, n, confidence)
    assert -1 <= bounds.low <= (wins - losses) / n <= bounds.high <= 1
    assert (bounds.low, bounds.high) == (-mirrored.high, -mirrored.low)


@given(counts())
@settings(max_examples=100, deadline=None)
def test_more_confidence_never_narrows(table: tuple[int, int, int]) -> None:
    wide, narrow = tango_bounds(*table, 0.99), tango_bounds(*table, 0.9)
    assert wide.low <= narrow.low
    assert wide.high >= narrow.high


@pytest.mark.parametrize("table", [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_counts_are_refused(table: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="impossible counts"):
        tango_bounds(*table, 0.95)


@pytest.mark.parametrize("confidence", [0.4, 1.0, float("nan")])
def test_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        tango_bounds(1, 2, 10, confidence)


def interval(values: Sequence[float], confidence: float = 0.95, clusters: Sequence[int] | None = None) -> Bounds:
    mean = float(np.mean(values))
    return mean_bounds(mean, mean_error(values, clusters), float(np.abs(values).max()), confidence)


def test_the_interval_of_symmetric_values_is_that_of_scipy() -> None:
    half = np.random.default_rng(1).normal(0, 0.4, size=20)
    values = 0.1 + np.concatenate([half, -half])
    bounds = interval(values.tolist())
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.90)
    assert (bounds.low, bounds.high) == (pytest.approx(reference.low), pytest.approx(reference.high))


def test_skewness_widens_the_interval_on_its_side_only() -> None:
    values = -np.random.default_rng(2).lognormal(size=60)
    bounds, reference = interval(values.tolist()), stats.ttest_1samp(values, 0).confidence_interval(0.90)
    assert bounds.low < reference.low - 0.02
    assert bounds.high == pytest.approx(reference.high)
    mirrored = interval((-values).tolist())
    assert (mirrored.low, mirrored.high) == (pytest.approx(-bounds.high), pytest.approx(-bounds.low))


def test_the_skewness_corrected_bound_solves_halls_equation() -> None:
    values = -np.random.default_rng(2).lognormal(size=60)
    n, skewness, spread = len(values), float(stats.skew(values)), float(values.std(ddof=1))
    w = (values.mean() - interval(values.tolist()).low) / spread
    transformed = w + skewness * w**2 / 3 + skewness**2 * w**3 / 27 + skewness / (6 * n)
    assert transformed == pytest.approx(stats.t.ppf(0.95, n - 1) / math.sqrt(n))


@pytest.mark.parametrize("n", [1, 2, 30])
def test_equal_values_are_not_certainty(n: int) -> None:
    bounds = mean_bounds(0.1, mean_error([0.1] * n), 0.5, 0.95)
    assert bounds.low < 0.1 < bounds.high


def test_clusters_take_the_error_of_their_means_when_they_are_equally_large() -> None:
    generator = np.random.default_rng(3)
    values = (generator.normal(size=(20, 1)) + generator.normal(size=(20, 5)) / 4).ravel()
    clusters = np.repeat(np.arange(20), 5).tolist()
    error = mean_error(values.tolist(), clusters)
    means = values.reshape(20, 5).mean(axis=1)
    assert (error.standard, error.groups) == (pytest.approx(stats.sem(means)), 20)
    assert error.standard > 1.8 * mean_error(values.tolist()).standard


def test_clusters_of_different_size_take_the_sandwich_of_least_squares() -> None:
    """The cluster-robust variance of an intercept, with the sums written out as matrices."""
    generator = np.random.default_rng(4)
    clusters = generator.integers(0, 9, size=50)
    values = generator.normal(size=50) + clusters
    design, residuals = np.ones((50, 1)), values - values.mean()
    meat = sum(
        np.outer(score, score) for g in set(clusters) for score in [design[clusters == g].T @ residuals[clusters == g]]
    )
    bread = np.linalg.inv(design.T @ design)
    variance = (9 / 8 * bread @ meat @ bread).item()
    assert mean_error(values.tolist(), clusters.tolist()).standard == pytest.approx(math.sqrt(variance))


def test_documents_that_each_have_their_own_source_are_not_clustered() -> None:
    values = np.random.default_rng(5).normal(size=30).tolist()
    assert mean_error(values, range(30)) == mean_error(values)


@pytest.mark.parametrize(("right", "n"), [(0, 12), (3, 12), (12, 12), (997, 1000)])
def test_shares_take_the_exact_interval_of_scipy(right: int, n: int) -> None:
    bounds = exact_share_bounds(right, n, 0.95)
    reference = stats.binomtest(right, n).proportion_ci(0.90, method="exact")
    assert (bounds.low, bounds.high) == (pytest.approx(reference.low), pytest.approx(reference.high))


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="impossible counts: 4 right among 3"):
        exact_share_bounds(4, 3, 0.95)


@functools.cache
def low(wins: int, losses: int, n: int) -> float:
    return tango_bounds(wins, losses, n, 0.95).low


@pytest.mark.parametrize("n", [100, 500])
@pytest.mark.parametrize("discordance", [0.04, 0.24])
@pytest.mark.parametrize("difference", [0.0, -0.02])
def test_false_passes_are_as_rare_as_promised(n: int, discordance: float, difference: float) -> None:
    """At the boundary of a rule (no lift; a drop of the whole margin), about 5 % of the samples pass."""
    trials = 6000
    generator = np.random.default_rng(n)
    wins = (discordance + difference) / 2
    tables = generator.multinomial(n, [wins, wins - difference, 1 - discordance], size=trials)
    passes = sum(low(int(a), int(b), n) > difference for a, b, _ in tables)
    noise = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert passes / trials <= 0.05 + 0.005 + noise  # lattice of the counts: up to .054 at n = 100
