"""Early decisions: boundaries as published, errors as promised, savings where the effect is large."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gate_errors import Task, share_promoted, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posttrain.config.schema import Role, Sequential
from posttrain.errors import ArtifactDamaged
from posttrain.gate.evidence import PairedAnswers
from posttrain.gate.sequential import (
    Look,
    ScoreProcess,
    is_hopeless,
    make_looks,
    obrien_fleming,
    portion_size,
    select_new,
    select_portion,
)
from posttrain.gate.spec import Scorecard
from posttrain.gate.verdict import is_settled, judge, plan_looks
from tests.support.gates import GUARD, LIFT, card_of, request_of

FIVE = (0.2, 0.4, 0.6, 0.8, 1.0)


def crossing(boundaries: Sequence[float], shares: Sequence[float], drift: float = 0.0) -> list[float]:
    """Chance of first exceeding each boundary, by a score process whose z at the end is normal around ``drift``."""
    process = ScoreProcess(drift)
    chances = []
    for look, (boundary, share) in enumerate(zip(boundaries, shares, strict=True)):
        step = share - (shares[look - 1] if look else 0.0)
        edge = boundary * math.sqrt(share)
        chances.append(process.beyond(edge, step))
        process.advance(edge, step)
    return chances


@pytest.mark.parametrize(
    ("error", "published"),
    [
        # K. K. G. Lan, D. L. DeMets, Biometrika 70 (1983) 659-663, and the tables made with their programs
        (0.025, (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
        (0.05, (4.2292, 2.8881, 2.2981, 1.9618, 1.7397)),
    ],
)
def test_boundaries_are_the_published_ones(error: float, published: tuple[float, ...]) -> None:
    assert obrien_fleming(FIVE, error) == pytest.approx(published, abs=2e-4)


@pytest.mark.parametrize(
    ("count", "error", "constant"),
    [
        # C. Jennison, B. W. Turnbull, Group Sequential Methods (2000), table 2.3: O'Brien and Fleming's constants
        (2, 0.025, 1.977),
        (3, 0.025, 2.004),
        (4, 0.025, 2.024),
        (5, 0.025, 2.040),
        (2, 0.05, 1.678),
        (5, 0.05, 1.751),
    ],
)
def test_the_original_boundaries_are_crossed_as_often_as_published(count: int, error: float, constant: float) -> None:
    shares = [look.share for look in make_looks(count)]
    boundaries = [constant / share**0.5 for share in shares]
    assert sum(crossing(boundaries, shares)) == pytest.approx(error, abs=1e-4)


def test_one_look_has_the_boundary_of_a_single_test() -> None:
    assert obrien_fleming((1.0,), 0.05) == pytest.approx((stats.norm.ppf(0.95),))
    assert Look().nominal(0.95) == 0.95


@given(
    shares=st.lists(st.floats(0.05, 0.95), min_size=0, max_size=4, unique=True),
    error=st.floats(0.005, 0.2),
)
@settings(max_examples=15, deadline=None)
def test_looks_whenever_they_come_spend_the_error_and_no_more(shares: list[float], error: float) -> None:
    at = (*sorted(round(share, 2) for share in shares), 1.0)
    if len(set(at)) < len(at):
        return
    assert sum(crossing(obrien_fleming(at, error), at)) == pytest.approx(error, rel=1e-6)


def test_crossing_agrees_with_simulated_processes() -> None:
    generator, boundaries = np.random.default_rng(0), obrien_fleming(FIVE, 0.05)
    steps = generator.normal(0.2 * 2.0, 0.2**0.5, size=(200_000, 5))
    z = np.cumsum(steps, axis=1) / np.sqrt(FIVE)
    first = np.where((z > boundaries).any(axis=1), (z > boundaries).argmax(axis=1), 5)
    expected = np.bincount(first, minlength=6)[:5] / len(z)
    assert crossing(boundaries, FIVE, drift=2.0) == pytest.approx(expected, abs=0.004)


@given(st.integers(0, 300), st.integers(1, 7), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_looks_see_more_and_more_until_all(count: int, of: int, seed: int) -> None:
    documents = list(range(count))
    seen: set[int] = set()
    for look in make_looks(of):
        new = select_new(documents, look, seed)
        assert not new & seen
        seen |= new
        assert seen == select_portion(documents, look, seed)
        assert len(seen) == portion_size(count, look)
    assert seen == set(documents)


def test_the_order_is_seeded_and_not_that_of_the_task() -> None:
    documents, half = list(range(100)), Look(1, 2)
    chosen = select_portion(documents, half, 1)
    assert chosen == select_portion(documents[::-1], half, 1) != select_portion(documents, half, 2)
    assert chosen != set(range(50))


def test_documents_of_one_source_are_seen_together() -> None:
    clusters = {document: document % 20 for document in range(200)}
    seen = select_portion(list(clusters), Look(1, 2), 0, clusters)
    assert {clusters[document] for document in seen} != set(range(20))
    assert len({clusters[document] for document in seen}) == 10


def test_a_candidate_with_bad_luck_goes_on_and_a_hopeless_one_does_not() -> None:
    first = Look(1, 5)
    assert not is_hopeless(PairedAnswers(20, 24, 264), 0.0, first, 0.95)
    assert is_hopeless(PairedAnswers(10, 44, 264), 0.0, first, 0.95)
    assert not is_hopeless(PairedAnswers(10, 44, 264), 0.0, Look(5, 5), 0.95)
    assert not is_hopeless(PairedAnswers(0, 0, 264), 0.0, first, 0.95)


def test_a_candidate_that_passes_is_never_hopeless() -> None:
    for wins in range(0, 80, 4):
        evidence = PairedAnswers(wins, 20, 400)
        if evidence.bounds(Look(2, 5).nominal(0.95)).low > 0:
            assert not is_hopeless(evidence, 0.0, Look(2, 5), 0.95)


@functools.cache
def early(lift: float, role: Role = Role.lift, threshold: float = 0.0) -> Any:
    task = Task(n=1319, discordance=0.24, lift=lift, role=role, threshold=threshold)
    return simulate([task], 3000, count=5)


NOISE = 3 * (0.05 * 0.95 / 3000) ** 0.5


def test_all_looks_together_err_no_more_often_than_one() -> None:
    assert share_promoted(early(0.0)) <= 0.05 + NOISE
    assert share_promoted(early(-0.02, Role.guard, -0.02)) <= 0.05 + NOISE


def test_large_effects_are_decided_early_and_small_ones_are_not_missed() -> None:
    used = {lift: np.mean([outcome.used for outcome in early(lift)]) for lift in (-0.1, 0.05, 0.1)}
    assert used[-0.1] < 0.3
    assert used[0.1] < 0.45
    assert share_promoted(early(0.1)) > 0.999
    fixed = share_promoted(simulate([Task(n=1319, discordance=0.24, lift=0.05)], 3000))
    assert share_promoted(early(0.05)) > fixed - 0.02


def test_looking_often_without_correction_would_err_more_often() -> None:
    """The check that the tests above can fail: five looks at 95 % each."""
    generator = np.random.default_rng(0)
    z = np.cumsum(generator.normal(size=(20_000, 5)), axis=1) / np.sqrt(np.arange(1, 6))
    assert (z > stats.norm.ppf(0.95)).any(axis=1).mean() > 0.1


def scorecard(wins: int, losses: int, n: int, look: Look, total: int) -> Scorecard:
    rest = n - wins - losses
    scores = {
        "base": [0.0] * wins + [1.0] * (losses + rest),
        "candidate": [1.0] * wins + [0.0] * losses + [1.0] * rest,
    }
    return card_of({"quiz": scores}, look=look, documents={"quiz": total})


def test_a_gate_settles_on_a_pass_a_failure_and_a_hopeless_candidate() -> None:
    asked = request_of({"quiz": LIFT}, sequential=Sequential.obrien_fleming)
    second = Look(2, 5)
    found = {
        counts: (is_settled(asked, card), judge(asked, card).state)
        for counts in ((90, 20), (20, 90), (40, 60), (60, 50))
        for card in [scorecard(*counts, 528, second, 1319)]
    }
    assert found == {
        (90, 20): (True, "pass"),
        (20, 90): (True, "fail"),
        (40, 60): (True, "undecided"),
        (60, 50): (False, "undecided"),
    }
    reason = judge(asked, scorecard(40, 60, 528, second, 1319)).reason
    assert "it is stopped early, as it can hardly pass any more" in reason


def test_an_early_verdict_takes_the_confidence_of_its_look() -> None:
    asked = request_of({"quiz": LIFT}, sequential=Sequential.obrien_fleming)
    (task,) = judge(asked, scorecard(60, 30, 264, Look(1, 5), 1319)).tasks
    assert task.confidence == pytest.approx(stats.norm.cdf(4.2292), abs=1e-6)
    assert task.state == "undecided"
    (last,) = judge(asked, scorecard(60, 30, 264, Look(5, 5), 264)).tasks
    assert last.confidence == pytest.approx(stats.norm.cdf(1.7397), abs=1e-5)
    assert last.state == "pass"


@pytest.mark.parametrize(("found", "total"), [(264, 1400), (263, 1319), (265, 1319)])
def test_a_look_that_has_not_seen_its_share_is_refused(found: int, total: int) -> None:
    asked = request_of({"quiz": LIFT}, sequential=Sequential.obrien_fleming)
    with pytest.raises(ArtifactDamaged, match="documents are scored, not"):
        judge(asked, scorecard(60, 30, found, Look(1, 5), total))
    unknown = replace(scorecard(60, 30, found, Look(1, 5), total), documents={})
    with pytest.raises(ArtifactDamaged, match="does not say how many documents there are"):
        judge(asked, unknown)


def test_a_gate_looks_once_unless_it_is_asked_to_look_often() -> None:
    assert plan_looks(request_of({"quiz": LIFT})) == [Look()]
    assert plan_looks(request_of({"quiz": LIFT}, sequential=Sequential.obrien_fleming, looks=3)) == make_looks(3)
    # what it is compared with is not scored here, so that it cannot be decided here
    alone = request_of({"quiz": GUARD}, ("candidate",), sequential=Sequential.obrien_fleming)
    assert plan_looks(alone) == [Look()]
