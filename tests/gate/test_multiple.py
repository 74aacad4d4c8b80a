"""Several lifts at once: Holm's decisions, and bounds that agree with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posttrain.gate.statistics import holm


def normal_low(z: float) -> Callable[[float], float]:
    """Lower bounds of a mean that was observed ``z`` standard errors above 0."""
    return lambda confidence: z - float(stats.norm.ppf(confidence))


def step_down(p_values: list[float], error: float) -> list[bool]:
    """Holm's procedure as it is published: the smallest p first, until one is too large."""
    order = np.argsort(p_values, kind="stable")
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > error / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


@given(st.lists(st.floats(-3, 6), min_size=1, max_size=8), st.floats(0.8, 0.99))
@settings(max_examples=300, deadline=None)
def test_decisions_are_holms(observed: list[float], confidence: float) -> None:
    claims = holm([normal_low(z) for z in observed], [0.0] * len(observed), confidence)
    p_values = [float(stats.norm.sf(z)) for z in observed]
    assert [claim.passed for claim in claims] == step_down(p_values, 1 - confidence)


@given(st.lists(st.floats(-3, 6), min_size=1, max_size=8), st.floats(-1, 1))
@settings(max_examples=200, deadline=None)
def test_adjusted_bounds_agree_with_the_decisions(observed: list[float], threshold: float) -> None:
    lows = [normal_low(z) for z in observed]
    claims = holm(lows, [threshold] * len(observed), 0.95)
    everything = all(claim.passed for claim in claims)
    for claim, low in zip(claims, lows, strict=True):
        assert claim.low <= low(0.95) or claim.low == threshold
        assert (claim.low >= threshold) if claim.passed else (claim.low <= threshold)
        if claim.passed and not everything:
            assert claim.low == threshold


def test_one_lift_alone_is_not_adjusted() -> None:
    (claim,) = holm([normal_low(2.0)], [0.0], 0.95)
    assert (claim.passed, claim.low) == (True, pytest.approx(2.0 - 1.6449, abs=1e-4))


@pytest.mark.parametrize("effects", [(0.0, 0.0, 0.0), (0.0, 2.0, 4.0), (1.0, 2.5, 3.0)])
def test_all_true_lifts_lie_above_the_adjusted_bounds_at_once(effects: tuple[float, ...]) -> None:
    trials, generator = 4000, np.random.default_rng(0)
    drawn = generator.normal(effects, size=(trials, len(effects)))
    covered = 0
    for observed in drawn:
        claims = holm([normal_low(z) for z in observed], [0.0] * len(effects), 0.95)
        # a claim says that the lift exceeds its bound; no lift exceeds itself
        covered += all(
            effect > claim.low or (effect == claim.low and not claim.passed)
            for effect, claim in zip(effects, claims, strict=True)
        )
    assert covered / trials >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / trials)


def test_a_lift_without_documents_is_never_claimed() -> None:
    claims = holm([lambda confidence: -np.inf, normal_low(9.0)], [0.0, 0.0], 0.95)
    assert [claim.passed for claim in claims] == [False, True]
