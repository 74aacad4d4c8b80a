"""Bounds of paired differences: published values, an independent solution, calibration."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from posttrain.gate.statistics import (
    Bounds,
    documents_needed,
    paired_bounds,
    paired_t_bounds,
    tango_bounds,
)

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


def test_the_t_interval_is_that_of_scipy() -> None:
    differences = np.random.default_rng(1).normal(0.1, 0.4, size=37)
    bounds = paired_t_bounds(differences.tolist(), 1.0, 0.95)
    reference = stats.ttest_1samp(differences, 0).confidence_interval(0.90)
    assert (bounds.low, bounds.high) == (pytest.approx(reference.low), pytest.approx(reference.high))


@pytest.mark.parametrize("n", [1, 2, 30])
def test_equal_differences_are_not_certainty(n: int) -> None:
    bounds = paired_bounds([0.5] * n, [0.4] * n, 0.95)
    assert bounds.low < 0.1 < bounds.high


def test_scores_of_zero_and_one_take_the_score_interval() -> None:
    new, old = [1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0]
    assert paired_bounds(new, old, 0.95) == tango_bounds(2, 1, 5, 0.95)


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_bounds([1.0, 0.0], [1.0], 0.95)


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


def test_documents_needed_matches_the_closed_form() -> None:
    """Discordance of 10 % and a lift of 2 points ask for about 1,540 documents."""
    differences = [1.0] * 60 + [-1.0] * 40 + [0.0] * 900
    assert documents_needed(differences, 0.0, 0.95) == pytest.approx(1540, abs=5)
    assert documents_needed(differences, 0.02, 0.95) is None


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05])
def test_documents_needed_without_discordance_pass_a_guard(margin: float) -> None:
    needed = documents_needed([0.0] * 10, -margin, 0.95)
    assert needed is not None
    assert tango_bounds(0, 0, needed, 0.95).low > -margin >= tango_bounds(0, 0, needed - 2, 0.95).low
