"""Halves of a gate's documents: who belongs where, what is rejected, and the false promotions that they prevent."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from posttrain.config.schema import GateConfig, GateTask, Half, OnFail, Role
from posttrain.errors import ArtifactDamaged
from posttrain.gate.halves import choose, half_of, select_half
from posttrain.gate.procedure import policy_for
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard, Verdict
from posttrain.gate.statistics import tango_bounds
from posttrain.gate.verdict import judge
from tests.support.judgements import task_verdict

HASHES = {number: hashlib.sha256(f"document {number}".encode()).hexdigest() for number in range(400)}
CHOOSING, JUDGING = (select_half(HASHES, half) for half in (Half.choosing, Half.judging))


def test_each_document_is_in_one_half_and_either_is_as_likely() -> None:
    assert frozenset(HASHES) == CHOOSING | JUDGING
    assert not CHOOSING & JUDGING
    assert 160 < len(CHOOSING) < 240
    assert select_half(HASHES, Half.both) == frozenset(HASHES)


def test_the_half_of_a_document_depends_on_its_content_alone() -> None:
    others = {1000 + number: HASHES[number] for number in range(0, 400, 3)}
    assert {number - 1000 for number in select_half(others, Half.judging)} == JUDGING & set(range(0, 400, 3))
    assert select_half(dict(reversed(HASHES.items())), Half.judging) == JUDGING


def test_documents_of_one_source_stay_together() -> None:
    sources = {number: f"book {number % 40}" for number in HASHES}
    found = select_half(HASHES, Half.judging, sources)
    assert all(len({number in found for number in range(book, 400, 40)}) == 1 for book in range(40))
    assert 0 < len(found) < 400
    for book in range(40):  # a half alone shows the same: the least hash of its books is in it
        part = {number: HASHES[number] for number in found}
        assert select_half(part, Half.judging, sources) == found
        assert (book in found) == (half_of(min(HASHES[number] for number in range(book, 400, 40))) is Half.judging)


def request(half: Half, chosen_from: int = 1) -> GateRequest:
    gate = GateConfig(half=half, chosen_from=chosen_from)
    systems: Any = {"base": SimpleNamespace(digest="old"), "candidate": SimpleNamespace(digest="new")}
    return GateRequest(
        stage="sft", gate=gate, tasks={"t": GateTask(role=Role.lift, metric="acc")}, systems=systems, dtype="float32",
        cache=Path(), scorecard=Path(),
    )  # fmt: skip


def scorecard(documents: frozenset[int], wins: int) -> Scorecard:
    rows = [
        DocumentScore(
            system=system, digest=digest, task="t", filter="none", doc_id=number, document_hash=HASHES[number],
            request_hash=str(number), target_hash="x", metrics={"acc": float(digest == "new" and place < wins)},
            response="", target="",
        )
        for system, digest in (("base", "old"), ("candidate", "new"))
        for place, number in enumerate(sorted(documents))
    ]  # fmt: skip
    return Scorecard(rows=tuple(rows), higher_is_better={"t": True}, documents={"t": len(documents)})


def test_the_half_for_choosing_promotes_nothing_and_stops_no_run() -> None:
    found = judge(request(Half.choosing), scorecard(CHOOSING, 100))
    assert (found.state, found.tasks[0].state) == ("undecided", "pass")
    assert "promotes nothing" in found.reason
    assert policy_for(GateConfig(half=Half.choosing), "undecided") is OnFail.warn
    assert policy_for(GateConfig(half=Half.choosing), "fail") is OnFail.stop


def test_the_half_for_judging_decides_and_says_among_how_many_it_was_chosen() -> None:
    found = judge(request(Half.judging, 20), scorecard(JUDGING, 100))
    assert found.state == "pass"
    assert found.notes[0] == "chosen from 20 on the other half of the documents, and judged on this one"
    whole = judge(request(Half.both, 20), scorecard(frozenset(HASHES), 100))
    assert "luck alone passes up to 64%" in whole.notes[0]


@pytest.mark.parametrize("half", [Half.choosing, Half.judging])
def test_documents_of_the_other_half_are_never_a_pass(half: Half) -> None:
    with pytest.raises(ArtifactDamaged, match=f"asks the {half.value} half"):
        judge(request(half), scorecard(frozenset(HASHES), 100))


def test_the_best_has_the_largest_lift_and_has_not_failed() -> None:
    def verdict(state: Any, *lifts: float, **figures: Any) -> Verdict:
        tasks = tuple(replace(task_verdict(state), lift=lift, **figures) for lift in lifts)
        return Verdict(state=state, gated=True, tasks=tasks, reason="")

    assert choose([verdict("undecided", 0.1, 0.2), verdict("fail", 0.9), verdict("undecided", 0.3)]) == 2
    assert choose([verdict("undecided", 0.2), verdict("undecided", 0.2)]) == 0
    assert choose([verdict("fail", 0.2)]) is None
    wide = verdict("undecided", 3.0, candidate=50.0, low=-3.0, high=9.0)
    assert choose([wide, verdict("undecided", 2.0, candidate=50.0, low=1.0, high=3.0)]) == 1


def test_choosing_by_luck_promotes_what_is_no_better_and_halves_do_not() -> None:
    """Twenty systems that differ from the base at random in a tenth of the answers, two thousand times."""

    def passes(won: int, lost: int, documents: int) -> bool:
        return tango_bounds(int(won), int(lost), documents, 0.95).low > 0

    repetitions, systems, discordance = 2000, 20, 0.1
    sizes = len(CHOOSING), len(JUDGING)
    draw = np.random.default_rng(0)
    naive = by_halves = 0
    for _ in range(repetitions):
        # wins and losses on either half
        differ = [draw.binomial(size, discordance, systems) for size in sizes]
        wins = [draw.binomial(count, 0.5) for count in differ]
        losses = [count - won for count, won in zip(differ, wins, strict=True)]
        gained = [won - lost for won, lost in zip(wins, losses, strict=True)]
        best = int(np.argmax(gained[0] + gained[1]))
        naive += passes(wins[0][best] + wins[1][best], losses[0][best] + losses[1][best], 400)
        chosen = int(np.argmax(gained[0]))
        by_halves += passes(wins[1][chosen], losses[1][chosen], sizes[1])
    assert naive / repetitions > 0.5
    # three standard errors of two thousand draws above the stated error
    assert by_halves / repetitions <= 0.05 + 3 * (0.05 * 0.95 / repetitions) ** 0.5
