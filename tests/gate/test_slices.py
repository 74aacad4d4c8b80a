"""Slices: what a verdict says of them, how often they err together, and what cannot be sliced."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from posttrain.config.schema import GateTask, Role
from posttrain.data.questions import META
from posttrain.errors import ArtifactDamaged
from posttrain.gate.slices import bound_parts, cut
from posttrain.gate.spec import Verdict
from posttrain.gate.verdict import judge
from posttrain.scoring.checks import check_slices
from tests.support.gates import GUARD, card, request, rows

TOPICS = {"billing": tuple(range(40)), "greetings": tuple(range(40, 120)), "other": tuple(range(120, 200))}


def decided(new: list[float], old: list[float], task: GateTask = GUARD, topics: Any = None, **settings: Any) -> Verdict:
    asked = replace(request(), tasks={"quiz": task})
    found = card(rows("base", old), rows("candidate", new), **settings)
    return judge(asked, replace(found, slices={"quiz": {"topic": TOPICS if topics is None else topics}}))


def answers(wrong: set[int]) -> list[float]:
    return [float(number not in wrong) for number in range(200)]


def test_a_loss_is_found_where_it_is() -> None:
    verdict = decided(answers({*range(12), 50, 130}), answers({199}))
    assert verdict.state != "pass"
    assert verdict.notes[0].startswith("quiz against base: 12 of 14 lost answers are in topic billing (−30.0 [")
    assert verdict.notes[0].endswith("at n = 40, corrected for 3 slices)")
    billing, greetings, other = verdict.tasks[0].slices
    assert (billing.worse, greetings.worse, other.worse, other.better) == (12, 1, 1, 1)
    assert billing.high < 0 < greetings.high
    assert sum(part.n for part in verdict.tasks[0].slices) == 200


def test_a_lift_is_found_and_a_loss_by_chance_is_called_one() -> None:
    won = decided(answers(set()), answers({*range(40, 70)}), GateTask(role=Role.lift, metric="acc"))
    assert won.state == "pass"
    assert "30 of 30 won answers are in topic greetings" in won.notes[0]
    lost = decided(answers({1, 50}), answers(set()))
    assert "which may be chance" in lost.notes[0]
    assert not [note for note in decided(answers(set()), answers(set())).notes if "answers are in" in note]


def test_where_less_is_better_a_higher_score_is_lost() -> None:
    verdict = decided(answers(set()), answers({*range(12)}), higher_is_better=False)
    assert "12 of 12 lost answers are in topic billing" in verdict.notes[0]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_limit_says_where_its_score_falls_short(higher_is_better: bool) -> None:
    wrong = {*range(20), 50, 130}
    scores = [float((number not in wrong) == higher_is_better) for number in range(200)]
    limit = GateTask(role=Role.limit, metric="acc", threshold=0.95 if higher_is_better else 0.05)
    verdict = decided(scores, scores, limit, higher_is_better=higher_is_better)
    billing, greetings, _ = verdict.tasks[0].slices
    assert (verdict.state, billing.n, billing.worse, greetings.worse) == ("fail", 40, 20, 1)
    assert billing.lift == pytest.approx(0.5 - 0.95)
    assert billing.high < 0 < greetings.high
    assert verdict.notes[0].startswith("quiz against threshold: 20 of 22 answers worse than the limit are in topic bil")
    right = [float(higher_is_better)] * 200
    met = decided(right, right, replace(limit, threshold=0.5), higher_is_better=higher_is_better)
    assert (met.state, [note for note in met.notes if "limit are in" in note]) == ("pass", [])


def test_slices_decide_nothing() -> None:
    new, old = answers({*range(12), 50}), answers({199})
    plain, sliced = decided(new, old, topics={"all": tuple(range(200))}), decided(new, old)
    assert (plain.state, plain.reason) == (sliced.state, sliced.reason)
    assert replace(plain.tasks[0], slices=()) == replace(sliced.tasks[0], slices=())


def test_a_scorecard_that_lacks_a_document_of_a_field_is_rejected() -> None:
    with pytest.raises(ArtifactDamaged, match="does not name the topic of document 120"):
        decided(answers(set()), answers(set()), topics={key: TOPICS[key] for key in ("billing", "greetings")})


def test_the_bounds_of_twelve_slices_hold_together() -> None:
    """No answer is more likely lost than won, yet single bounds would accuse some slice in most gates."""
    draw, slices, size, gates = np.random.default_rng(0), 12, 60, 200
    values = [str(number // size) for number in range(slices * size)]
    task: Any = SimpleNamespace(slices={"topic": values}, clusters=None)
    together = single = 0
    for _ in range(gates):
        new, old = (np.where(draw.random(len(values)) < 0.15, draw.integers(0, 2, len(values)), 1.0) for _ in range(2))
        parts = cut(task, new.tolist(), old.tolist())
        together += any(part.high < 0 for part in bound_parts(parts, 0.95))
        single += any(part.evidence.bounds(0.95).high < 0 for part in parts)
    assert single / gates > 0.25
    assert together / gates <= 0.05 + 3 * (0.05 * 0.95 / gates) ** 0.5


def test_a_field_that_documents_lack_is_told_once_with_the_fields_there_are() -> None:
    documents = [{"topic": "a", META: '{"level": 1}'}, {"topic": "b", META: "{}"}]
    task = GateTask(role=Role.guard, metric="acc", slices=["topic", "level", "kind"])
    (problem,) = check_slices("tasks.t", task, documents)
    assert (problem.where, problem.what) == ("tasks.t.slices", "document 0 has no field kind")
    assert problem.fix == "Available: level, topic"
    (problem,) = check_slices("tasks.t", replace(task, slices=["topic", "level"]), documents)
    assert problem.what == "document 1 has no field level"
    assert not list(check_slices("tasks.t", replace(task, slices=["topic"]), documents))
    many = [{"id": number} for number in range(201)]
    (problem,) = check_slices("tasks.t", replace(task, slices=["id"]), many)
    assert "id has 201 values" in problem.what
