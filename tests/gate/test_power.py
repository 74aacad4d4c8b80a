"""How many documents decide, and what a number of documents can decide, against simulated gates."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.gate.statistics import paired_documents, paired_power, tango_bounds

TRIALS = 2000


def passing(n: int, discordance: float, effect: float, threshold: float) -> float:
    """Share of simulated samples whose lower bound exceeds the threshold."""

    @functools.cache
    def passes(wins: int, losses: int) -> bool:
        return tango_bounds(wins, losses, n, 0.95).low > threshold

    cells = [(discordance + effect) / 2, (discordance - effect) / 2, 1 - discordance]
    drawn = np.random.default_rng(n).multinomial(n, cells, size=TRIALS)
    return float(np.mean([passes(int(wins), int(losses)) for wins, losses, _ in drawn]))


@pytest.mark.parametrize(
    ("discordance", "effect", "threshold", "published"),
    [
        # (z_0.95 + z_0.8)^2 (discordance - effect^2) / effect^2
        (0.1, 0.02, 0.0, 1540),
        (0.1, 0.03, 0.0, 690),
        (0.1, 0.05, 0.0, 250),
        (0.2, 0.02, 0.0, 3090),
        (0.2, 0.05, 0.0, 490),
    ],
)
def test_documents_for_a_lift_are_those_of_the_closed_form(
    discordance: float, effect: float, threshold: float, published: int
) -> None:
    assert paired_documents(discordance, effect, threshold, 0.95) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("discordance", "effect", "threshold"),
    [
        (0.1, 0.05, 0.0),
        (0.1, 0.0, -0.03),
        (0.02, 0.0, -0.02),
        (0.3, 0.3, 0.15),
        (0.02, -0.0175, -0.05),
        (0.2, 0.0, -0.05),
    ],
)
def test_documents_decide_four_of_five_samples(discordance: float, effect: float, threshold: float) -> None:
    needed = paired_documents(discordance, effect, threshold, 0.95)
    assert passing(needed, discordance, effect, threshold) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("n", [100, 500])
@pytest.mark.parametrize(
    ("discordance", "effect", "threshold"),
    [(0.1, 0.05, 0.0), (0.1, 0.0, -0.02), (0.2, 0.0, -0.02), (0.2, 0.02, 0.0), (0.04, 0.0, -0.05), (0.4, 0.4, 0.3)],
)
def test_power_is_that_of_simulated_gates(n: int, discordance: float, effect: float, threshold: float) -> None:
    noise = 3 * math.sqrt(0.25 / TRIALS)
    expected = passing(n, discordance, effect, threshold)
    assert paired_power(n, discordance, effect, threshold, 0.95) == pytest.approx(expected, abs=0.03 + noise)


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(-1, 1), st.floats(-0.99, 0.99))
@settings(max_examples=300, deadline=None)
def test_power_is_a_chance_and_grows_with_the_effect(
    n: int, discordance: float, effect: float, threshold: float
) -> None:
    assert 0 <= paired_power(n, discordance, effect, threshold, 0.95) <= 1
    if effect > threshold:
        more = paired_power(4 * n, discordance, effect, threshold, 0.95)
        assert more >= paired_power(n, discordance, effect, threshold, 0.95) - 1e-12


def test_identical_systems_pass_a_guard_from_a_number_of_documents_on() -> None:
    """With no discordant pair the bound is -z^2 / (n + z^2): above a drop of 2 points from 133 documents on."""
    needed = paired_documents(0.0, 0.0, -0.02, 0.95)
    assert needed in (133, 134, 135)
    assert tango_bounds(0, 0, needed, 0.95).low > -0.02 >= tango_bounds(0, 0, needed - 2, 0.95).low
    assert (paired_power(needed - 2, 0, 0, -0.02, 0.95), paired_power(needed, 0, 0, -0.02, 0.95)) == (0.0, 1.0)


def test_an_effect_that_does_not_exceed_the_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="does not exceed"):
        paired_documents(0.1, -0.02, -0.02, 0.95)
