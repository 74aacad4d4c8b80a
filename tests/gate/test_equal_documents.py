"""Equal documents are one piece of evidence, and gates without force are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.schema import GateConfig, GateTask, Role, Sequential
from posttrain.gate.evidence import Pool, pair_scores
from posttrain.gate.matching import group_equal, merge_sources
from posttrain.gate.reasons import weaknesses
from posttrain.gate.sequential import Look, make_looks, select_new, select_portion
from posttrain.gate.spec import DocumentScore, Scorecard, Verdict
from posttrain.gate.verdict import is_settled, judge
from tests.support.gates import GUARD, LIFT, card_of, request, request_of, rows

HASHES = ("document_hash", "request_hash")
LIMIT = GateTask(role=Role.limit, metric="acc", threshold=0.5)


def copied(found: Sequence[DocumentScore], of: Sequence[int], hashes: Sequence[str] = HASHES) -> list[DocumentScore]:
    """Return rows in which document i is a copy of document ``of[i]``, by the given hashes."""
    return [
        replace(row, **{name: getattr(found[first], name) for name in hashes})
        for row, first in zip(found, of, strict=True)
    ]


def judged(
    base: Sequence[float], candidate: Sequence[float], of: Sequence[int], task: GateTask = LIFT, **more: Any
) -> Verdict:
    hashes = more.pop("hashes", HASHES)
    scored = [*copied(rows("base", base), of, hashes), *copied(rows("candidate", candidate), of, hashes)]
    higher = more.pop("higher_is_better", True)
    return judge(request(task, **more), Scorecard(rows=tuple(scored), higher_is_better={"quiz": higher}))


@pytest.mark.parametrize("hashes", [("document_hash",), ("request_hash",), HASHES])
@pytest.mark.parametrize(
    ("base", "candidate", "task", "higher"),
    [
        (0.0, 1.0, LIFT, True),
        (4.4, 0.9, LIFT, False),
        (0.0, 100.0, LIFT, True),
        (0.0, 1.0, LIMIT, True),
        (1.0, 1.0, GUARD, True),
        (0.3, 0.3, GUARD, True),
    ],
)
def test_one_question_200_times_is_one_document(
    base: float, candidate: float, task: GateTask, higher: bool, hashes: tuple[str, ...]
) -> None:
    verdict = judged([base] * 200, [candidate] * 200, [0] * 200, task, hashes=hashes, higher_is_better=higher)
    alone = judged([base], [candidate], [0], task, higher_is_better=higher)
    assert verdict.state == alone.state == "undecided"
    (found,), (single,) = verdict.tasks, alone.tasks
    assert (found.n, found.low, found.high) == (single.n, single.low, single.high) == (1, found.low, found.high)
    assert "200 documents, 1 distinct" in found.reason
    assert verdict.notes == ("quiz: 200 documents, 1 distinct: equal ones count once",)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1)]), min_size=1, max_size=30), st.integers(0, 99))
def test_copies_change_nothing(pairs: list[tuple[int, int]], seed: int) -> None:
    """However often each document is repeated, and wherever the copies stand."""
    generator = np.random.default_rng(seed)
    of = generator.permutation(np.repeat(np.arange(len(pairs)), generator.integers(1, 9, len(pairs)))).tolist()
    first = {document: of.index(document) for document in of}
    scores = [[float(pairs[document][side]) for document in of] for side in (0, 1)]
    with_copies = judged(*scores, [first[document] for document in of])
    order = sorted(first, key=lambda document: first[document])
    single = judged(*([float(pairs[document][side]) for document in order] for side in (0, 1)), range(len(order)))
    (found,), (expected,) = with_copies.tasks, single.tasks
    for name in ("n", "lift", "low", "high", "base", "candidate", "state"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("looks", [1, 5])
def test_copies_raise_no_false_promotions(binary: bool, looks: int) -> None:
    """Without a true lift, and with some documents repeated up to twenty times, as scraped data has them."""
    generator = np.random.default_rng(7)
    gates, documents, promoted = 100, 40, 0
    asked = request(LIFT, looks=looks, sequential=Sequential.obrien_fleming if looks > 1 else Sequential.none)
    for gate in range(gates):
        copies = np.minimum(generator.zipf(1.6, documents), 20)
        of = np.repeat(np.arange(documents), copies)
        base, candidate = generator.random((2, documents)).round(0 if binary else 6)
        first = np.searchsorted(of, of)
        scored = [
            row
            for system, scores in (("base", base), ("candidate", candidate))
            for row in copied(rows(system, scores[of].tolist()), first.tolist())
        ]
        clusters = {document: str(source) for document, source in enumerate(of.tolist())}
        card = Scorecard(
            rows=(), higher_is_better={"quiz": True}, documents={"quiz": len(of)}, clusters={"quiz": clusters}
        )
        for look in make_looks(looks):
            seen = select_portion(range(len(of)), look, gate, clusters)
            part = replace(card, rows=tuple(row for row in scored if row.doc_id in seen), look=look)
            seeded = replace(asked, gate=replace(asked.gate, seed=gate))
            if is_settled(seeded, part):
                break
        promoted += judge(seeded, part).state == "pass"
    assert promoted / gates < 0.05 + 3 * (0.05 * 0.95 / gates) ** 0.5


def test_the_simulation_above_can_fail() -> None:
    """Copies that count as documents of their own promote far too often."""
    generator = np.random.default_rng(7)
    promoted = 0
    for _ in range(100):
        of = np.repeat(np.arange(60), np.minimum(generator.zipf(1.6, 60), 40))
        base, candidate = generator.random((2, 60)).round()
        promoted += judged(base[of].tolist(), candidate[of].tolist(), range(len(of))).state == "pass"
    assert promoted / 100 > 0.15


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 7), st.integers(0, 9))
def test_looks_take_clusters_whole(sources: list[int], looks: int, seed: int) -> None:
    clusters = dict(enumerate(sources))
    seen: set[int] = set()
    for look in make_looks(looks):
        new = select_new(range(len(sources)), look, seed, clusters)
        assert {clusters[document] for document in new}.isdisjoint({clusters[document] for document in seen})
        seen |= new
        assert len({clusters[document] for document in seen}) == -(-len(set(sources)) * look.number // look.of)
    assert seen == set(clusters)


def test_equal_documents_join_their_sources() -> None:
    groups = group_equal({0: ("a", "x"), 1: ("b", "y"), 2: ("c", "x"), 3: ("b", "z"), 4: ("d", ""), 5: ("e", "")})
    assert groups == [[0, 2], [1, 3], [4], [5]]
    sources = merge_sources(groups, {0: "p", 1: "q", 2: "q", 3: "r", 4: "r", 5: "s"})
    assert len(set(sources)) == 2
    assert sources[0] == sources[1] == sources[2] != sources[3]


def test_the_same_documents_in_several_guards_are_no_more_evidence_together() -> None:
    scores = {"base": [1.0, 0.0] * 50, "candidate": [1.0, 0.0] * 45 + [0.0, 1.0] * 5}
    tasks = {f"guard{i}": GUARD for i in range(8)}
    card = card_of(dict.fromkeys(tasks, scores))
    apart = judge(request_of(tasks, pooled_max_drop=0.05), card).tasks[-1]
    shared = tuple(replace(row, document_hash=f"d{row.doc_id}") for row in card.rows)
    together = judge(request_of(tasks, pooled_max_drop=0.05), replace(card, rows=shared)).tasks[-1]
    single = judge(request_of({"guard0": GUARD}), card).tasks[0]
    assert (together.low, together.high) == pytest.approx((single.low, single.high))
    assert apart.low > together.low
    part = pair_scores(scores["candidate"], scores["base"])
    halves = Pool([part, part], [[1.0, 0.5], [0.5, 1.0]]).bounds(0.95)
    assert part.bounds(0.95).low < halves.low < Pool([part, part]).bounds(0.95).low


@pytest.mark.parametrize(
    ("gate", "task", "note"),
    [
        ({}, GateTask(role=Role.lift, metric="acc", min_lift=-0.1), "quiz: min_lift -0.1 is below 0"),
        ({}, GateTask(role=Role.guard, metric="acc", max_drop=1.0), "quiz: max_drop 1 allows to lose all"),
        ({}, GateTask(role=Role.guard, metric="acc", max_drop=7.0), "quiz: max_drop 7 allows to lose all"),
        ({"confidence": 0.51}, LIFT, "confidence 0.51 is low: luck alone passes up to 49%"),
        ({"confidence": 0.79}, GUARD, "confidence 0.79 is low"),
        ({}, GateTask(role=Role.limit, metric="acc", threshold=-0.1), "quiz: threshold -0.1: no score"),
        ({}, GateTask(role=Role.limit, metric="acc", threshold=1.2, higher_is_better=False), "quiz: threshold 1.2"),
        ({"pooled_max_drop": 0.9}, GUARD, "pooled_max_drop 0.9 allows to lose most"),
    ],
)
def test_a_gate_that_cannot_fail_is_named(gate: dict[str, Any], task: GateTask, note: str) -> None:
    assert any(each.startswith(note) for each in weaknesses(GateConfig(**gate), {"quiz": task}))
    higher = task.higher_is_better is not False
    verdict = judged([0.0, 1.0] * 20, [1.0, 0.0] * 20, range(40), task, higher_is_better=higher, **gate)
    assert any(each.startswith(note) for each in verdict.notes)


def test_a_gate_that_is_off_or_empty_is_named() -> None:
    assert weaknesses(GateConfig(enabled=False), {}) == [
        "the gate is switched off: nothing is asked, and everything passes"
    ]
    assert judge(request_of({}), card_of({})).notes == ("no task is asked",)


def test_a_guard_with_nothing_to_lose_is_named() -> None:
    verdict = judged(
        [0.0] * 38 + [1.0] * 2, [0.0] * 40, range(40), GateTask(role=Role.guard, metric="acc", max_drop=0.1)
    )
    assert verdict.notes == ("quiz against base cannot fail: it may lose 10 points, and has 5 to lose",)


@pytest.mark.parametrize("task", [LIFT, GUARD, LIMIT])
def test_an_ordinary_gate_has_no_notes(task: GateTask) -> None:
    assert weaknesses(GateConfig(), {"quiz": task}) == []
    assert judged([0.0, 1.0] * 20, [1.0, 1.0] * 20, range(40), task).notes == ()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("base", "candidate"), [(0.0, 1.0), (4.4, 0.0), (1.0, 0.5), (1000.0, 0.1)])
def test_one_source_or_two_never_pass_a_lift(groups: int, base: float, candidate: float) -> None:
    task = replace(LIFT, cluster="source")
    scored = (*rows("base", [base] * 40), *rows("candidate", [candidate] * 40))
    clusters = {"quiz": {document: str(document % groups) for document in range(40)}}
    card = Scorecard(rows=scored, higher_is_better={"quiz": candidate > base}, clusters=clusters, look=Look())
    assert judge(request(task), card).state == "undecided"
