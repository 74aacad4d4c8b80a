"""Which interval decides about which scores, and what it takes to decide more."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posttrain.gate.evidence import Evidence, Mean, PairedAnswers, Pool, RightAnswers, measure_distance, pair_scores
from posttrain.gate.statistics import tango_bounds


def test_right_and_wrong_answers_take_the_score_interval() -> None:
    evidence = pair_scores([1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0, 0.0])
    assert evidence == PairedAnswers(wins=2, losses=1, n=5)
    assert evidence.bounds(0.95) == tango_bounds(2, 1, 5, 0.95)
    assert "Tango" in evidence.method


def test_other_scores_take_students_t() -> None:
    evidence = pair_scores([0.5, 0.7, 0.1], [0.4, 0.9, 0.3])
    assert "Student" in evidence.method
    assert evidence.mean == pytest.approx(-0.1)
    assert evidence.standard_error == pytest.approx(stats.sem([0.1, -0.2, -0.2]))


def test_sources_turn_right_and_wrong_answers_into_students_t_over_sources() -> None:
    new, old = [1.0, 1.0, 0.0, 0.0] * 10, [0.0, 1.0, 0.0, 0.0] * 10
    assert pair_scores(new, old, list(range(40))) == pair_scores(new, old)
    clustered = pair_scores(new, old, [document // 4 for document in range(40)])
    assert clustered.method == "Student's t over 10 clusters, corrected for skewness"


def test_sources_with_the_same_answers_count_once() -> None:
    """Forty documents that are four copies of ten are worth no more than the ten."""
    generator = np.random.default_rng(0)
    differences = generator.choice([-1.0, 0.0, 1.0], size=10)
    copied = np.repeat(differences, 4)
    clusters = np.repeat(np.arange(10), 4).tolist()
    evidence = pair_scores(np.maximum(copied, 0).tolist(), np.maximum(-copied, 0).tolist(), clusters)
    single = Mean(differences.tolist(), 1.0)
    assert evidence.bounds(0.95).low == pytest.approx(single.bounds(0.95).low)


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        pair_scores([1.0, 0.0], [1.0])


def test_a_share_beside_a_threshold_takes_the_exact_interval() -> None:
    scores = [1.0] * 95 + [0.0] * 5
    above = measure_distance(scores, 0.9, higher_is_better=True)
    assert above == RightAnswers(95, 100, 0.9)
    assert above.bounds(0.95).low == pytest.approx(stats.beta.ppf(0.05, 95, 6) - 0.9)
    below = measure_distance([1.0 - score for score in scores], 0.1, higher_is_better=False)
    assert below.bounds(0.95).low == pytest.approx(above.bounds(0.95).low)


def test_other_scores_beside_a_threshold_take_students_t() -> None:
    scores = np.random.default_rng(1).normal(3.0, 1.0, size=50)
    evidence = measure_distance(scores.tolist(), 3.5, higher_is_better=False)
    assert evidence.mean == pytest.approx(3.5 - scores.mean())
    assert evidence.standard_error == pytest.approx(stats.sem(scores))


def test_the_bootstrap_is_seeded_and_near_the_interval_that_decides() -> None:
    values = np.random.default_rng(2).normal(0.1, 1.0, size=300).tolist()
    evidence = Mean(values, 3.0)
    found = evidence.bootstrap(0.95, seed=1)
    assert found == evidence.bootstrap(0.95, seed=1) != evidence.bootstrap(0.95, seed=2)
    assert found is not None
    bounds = evidence.bounds(0.95)
    assert (found.low, found.high) == (pytest.approx(bounds.low, abs=0.01), pytest.approx(bounds.high, abs=0.01))


def test_the_bootstrap_draws_sources() -> None:
    values = np.repeat(np.random.default_rng(3).normal(size=40), 5)
    clustered = Mean(values.tolist(), 3.0, np.repeat(np.arange(40), 5).tolist()).bootstrap(0.95, seed=0)
    single = Mean(values.tolist(), 3.0).bootstrap(0.95, seed=0)
    assert clustered is not None
    assert single is not None
    assert (clustered.high - clustered.low) / (single.high - single.low) == pytest.approx(5**0.5, rel=0.15)
    assert Mean([0.5] * 9, 1.0).bootstrap(0.95, seed=0) is None


def test_a_pool_of_equal_tasks_has_the_error_of_a_mean() -> None:
    part = PairedAnswers(30, 20, 500)
    pool, bounds = Pool([part] * 4), part.bounds(0.95)
    assert pool.mean == part.mean
    assert pool.n == 2000
    assert pool.bounds(0.95).low == pytest.approx(part.mean - (part.mean - bounds.low) / 2)
    assert pool.bounds(0.95).high == pytest.approx(part.mean + (bounds.high - part.mean) / 2)


def test_a_pool_gives_every_task_the_same_weight() -> None:
    pool = Pool([PairedAnswers(10, 0, 100), PairedAnswers(0, 0, 10_000)])
    assert pool.mean == pytest.approx(0.05)


def test_a_pool_of_large_tasks_agrees_with_the_normal_interval() -> None:
    parts = [PairedAnswers(300, 260, 3000), PairedAnswers(500, 530, 4000), PairedAnswers(90, 60, 900)]
    pool = Pool(parts)
    assert pool.mean - pool.bounds(0.95).low == pytest.approx(stats.norm.ppf(0.95) * pool.standard_error, rel=0.02)


@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05])
@pytest.mark.parametrize(
    "same",
    [
        lambda n: PairedAnswers(0, 0, n),
        lambda n: RightAnswers(n, n, 1.0),
        lambda n: Mean([0.0] * n, 1.0),
        lambda n: Pool([PairedAnswers(0, 0, n)]),
    ],
    ids=["paired", "right", "mean", "pool"],
)
def test_documents_without_any_difference_are_enough_and_not_too_many(
    same: Callable[[int], Evidence], margin: float
) -> None:
    needed = same(10).documents(0.0, -margin, 0.95)
    assert same(needed).bounds(0.95).low > -margin >= same(needed - 2).bounds(0.95).low


def test_documents_of_a_pool_are_those_of_all_its_tasks() -> None:
    part = PairedAnswers(20, 20, 200)
    alone, pooled = part.documents(0.0, -0.02, 0.95), Pool([part] * 5).documents(0.0, -0.02, 0.95)
    assert pooled == pytest.approx(alone, rel=0.05)  # a fifth of them on each task


def test_documents_of_clustered_scores_grow_with_what_the_sources_share() -> None:
    values = np.random.default_rng(6).normal(size=50)
    clustered = Mean(np.repeat(values, 4).tolist(), 3.0, np.repeat(np.arange(50), 4).tolist())
    single = Mean(values.tolist(), 3.0)
    assert clustered.documents(0.5, 0.0, 0.95) == pytest.approx(4 * single.documents(0.5, 0.0, 0.95), rel=0.05)


@given(
    scores=st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=40),
    groups=st.integers(1, 5),
    confidence=st.floats(0.55, 0.999),
)
@settings(max_examples=200, deadline=None)
def test_bounds_enclose_the_mean_and_turn_around_with_the_systems(
    scores: list[tuple[float, float]], groups: int, confidence: float
) -> None:
    new, old = [pair[0] for pair in scores], [pair[1] for pair in scores]
    clusters = [index % groups for index in range(len(scores))]
    evidence, turned = pair_scores(new, old, clusters), pair_scores(old, new, clusters)
    bounds, mirrored = evidence.bounds(confidence), turned.bounds(confidence)
    assert bounds.low <= evidence.mean <= bounds.high
    assert (bounds.low, bounds.high) == (pytest.approx(-mirrored.high), pytest.approx(-mirrored.low))
