"""From scores to a verdict."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from posttrain.config.schema import GateTask, Role
from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import DocumentScore, Scorecard
from posttrain.gate.verdict import judge, verdict_json
from tests.support.gates import GUARD, LIFT, binary, card, decide, request, rows


@pytest.mark.parametrize(("right", "state"), [(80, "pass"), (52, "undecided"), (20, "fail")])
def test_a_lift_is_passed_undecided_or_failed(right: int, state: str) -> None:
    verdict = decide(binary(50, 100), binary(right, 100))
    assert verdict.state == verdict.tasks[0].state == state
    assert verdict.tasks[0].lift == pytest.approx((right - 50) / 100)


@pytest.mark.parametrize(("right", "n", "state"), [(500, 1000, "pass"), (5, 10, "undecided"), (300, 1000, "fail")])
def test_a_guard_needs_evidence_not_the_lack_of_it(right: int, n: int, state: str) -> None:
    assert decide(binary(n // 2, n), binary(right, n), GUARD).state == state


def test_identical_answers_never_pass_a_lift() -> None:
    for n in (1, 100, 5000):
        assert decide(binary(n // 2, n), binary(n // 2, n)).state == "undecided"
        assert decide([0.5] * n, [0.5] * n).state == "undecided"


def test_a_lift_has_to_exceed_what_the_recipe_demands() -> None:
    base, candidate = binary(500, 1000), binary(560, 1000)
    assert decide(base, candidate).state == "pass"
    assert decide(base, candidate, GateTask(role=Role.lift, metric="acc", min_lift=0.08)).state == "fail"


def test_without_documents_nothing_is_decided() -> None:
    verdict = decide([], [])
    assert (verdict.state, verdict.tasks[0].n, verdict.tasks[0].reason) == ("undecided", 0, "there are no documents")


def test_lower_is_better_turns_lift_and_bounds_around() -> None:
    base, candidate = [0.9, 0.8, 0.85, 0.95, 0.7] * 8, [0.5, 0.45, 0.4, 0.6, 0.41] * 8
    parts = rows("base", base), rows("candidate", candidate)
    down, up = judge(request(), card(*parts, higher_is_better=False)), judge(request(), card(*parts))
    assert (down.state, up.state) == ("pass", "fail")
    assert (down.tasks[0].lift, down.tasks[0].low) == (
        pytest.approx(-up.tasks[0].lift),
        pytest.approx(-up.tasks[0].high),
    )
    assert down.tasks[0].candidate == up.tasks[0].candidate == pytest.approx(sum(candidate) / 40)


def test_a_lift_over_the_base_alone_is_not_enough() -> None:
    three = ("base", "parent", "candidate")
    parts = rows("base", binary(10, 100)), rows("parent", binary(90, 100)), rows("candidate", binary(60, 100))
    verdict = judge(request(systems=three), card(*parts))
    assert {task.against: task.state for task in verdict.tasks} == {"base": "pass", "parent": "fail"}
    assert verdict.state == "fail"
    assert (verdict.tasks[0].base, verdict.tasks[0].parent) == (0.1, 0.9)


def test_a_parent_that_is_the_base_is_compared_with_once() -> None:
    verdict = judge(request(against=["parent"]), card(rows("base", binary(1, 9)), rows("candidate", binary(9, 9))))
    assert [task.against for task in verdict.tasks] == ["base"]
    assert verdict.tasks[0].parent == verdict.tasks[0].base


def test_one_failed_task_outweighs_undecided_and_passed_ones() -> None:
    tasks = {"good": LIFT, "open": LIFT, "bad": GUARD}
    scores = {"good": 90, "open": 51, "bad": 10}
    parts = [rows("base", binary(50, 100), name) + rows("candidate", binary(scores[name], 100), name) for name in tasks]
    asked = replace(request(), tasks=tasks)
    full = Scorecard(rows=card(*parts).rows, higher_is_better=dict.fromkeys(tasks, True))
    assert judge(asked, full).state == "fail"
    assert judge(replace(asked, tasks={"good": LIFT, "open": LIFT}), full).state == "undecided"
    assert judge(replace(asked, tasks={"good": LIFT}), full).state == "pass"


def test_a_gate_that_asks_nothing_never_passes() -> None:
    empty = Scorecard(rows=(), higher_is_better={})
    assert judge(replace(request(), tasks={}), empty).state == "undecided"
    assert judge(request(against=[]), empty).state == "undecided"


def test_a_gate_that_is_off_passes_and_says_so() -> None:
    verdict = judge(request(enabled=False), Scorecard(rows=(), higher_is_better={}))
    assert (verdict.state, verdict.gated, verdict.tasks) == ("pass", False, ())
    assert "off" in verdict.reason


BASE, CANDIDATE = rows("base", binary(0, 50)), rows("candidate", binary(50, 50))


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        (BASE + CANDIDATE[:-1], "candidate has no score for 1 documents, such as 49"),
        (BASE[1:] + CANDIDATE, "base has no score for 1 documents, such as 0"),
        (CANDIDATE, "base has no score for 50 documents"),
        (BASE + CANDIDATE + CANDIDATE[:1], "two scores for document 0"),
        (
            [*BASE, replace(CANDIDATE[0], document_hash="x"), *CANDIDATE[1:]],
            "differ in the document_hash of document 0",
        ),
        ([*BASE, replace(CANDIDATE[0], request_hash="x"), *CANDIDATE[1:]], "differ in the request_hash of document 0"),
        ([*BASE, replace(CANDIDATE[0], target_hash="x"), *CANDIDATE[1:]], "differ in the target_hash of document 0"),
        ([*BASE, replace(CANDIDATE[0], metrics={"acc": math.nan}), *CANDIDATE[1:]], "no finite acc for document 0"),
        ([*BASE, replace(CANDIDATE[0], metrics={}), *CANDIDATE[1:]], "no finite acc for document 0"),
        (
            [replace(row, digest="an older base") for row in BASE] + CANDIDATE,
            "scores of base are those of an older bas",
        ),
        ([*BASE, replace(CANDIDATE[0], digest="old"), *CANDIDATE[1:]], "of candidate are those of old.* stale"),
        (rows("base", [0.0], filter_name="a") + rows("candidate", [1.0], filter_name="b"), "differ in the filter"),
        (BASE + CANDIDATE + rows("base", [0.0], filter_name="b"), "scored under several filters"),
    ],
)
def test_scores_that_do_not_match_are_refused(scores: list[DocumentScore], complaint: str) -> None:
    with pytest.raises(ArtifactDamaged, match=complaint):
        judge(request(), card(scores))


def test_a_part_of_the_documents_is_refused() -> None:
    part = Scorecard(rows=(*BASE, *CANDIDATE), higher_is_better={"quiz": True}, documents={"quiz": 51})
    with pytest.raises(ArtifactDamaged, match="50 documents are scored, not 51"):
        judge(request(), part)
    assert judge(request(), replace(part, documents={"quiz": 50})).state == "pass"


@pytest.mark.parametrize("stated", [True, False])
def test_a_direction_that_the_scores_contradict_is_refused(stated: bool) -> None:
    parts = card(BASE, CANDIDATE, higher_is_better=not stated)
    with pytest.raises(ArtifactDamaged, match=f"higher_is_better={stated}"):
        judge(request(replace(LIFT, higher_is_better=stated)), parts)
    agreed = judge(request(replace(LIFT, higher_is_better=not stated)), parts)
    assert agreed.state == ("fail" if stated else "pass")


def test_a_scorecard_without_direction_is_refused() -> None:
    with pytest.raises(ArtifactDamaged, match="more is better"):
        judge(request(), Scorecard(rows=(*BASE, *CANDIDATE), higher_is_better={}))


def test_the_order_of_rows_does_not_matter() -> None:
    assert judge(request(), card(CANDIDATE[::-1], BASE)) == judge(request(), card(BASE, CANDIDATE))


def test_the_filter_of_the_recipe_is_judged() -> None:
    task = GateTask(role=Role.lift, metric="acc", filter="strict")
    good = rows("base", binary(0, 50), filter_name="strict") + rows("candidate", binary(50, 50), filter_name="strict")
    bad = rows("base", binary(50, 50), filter_name="loose") + rows("candidate", binary(0, 50), filter_name="loose")
    assert judge(request(task), card(good, bad)).state == "pass"


def test_an_undecided_lift_says_what_would_decide_it() -> None:
    base = [1.0] * 8 + [0.0] * 12 + [1.0] * 80 + [0.0] * 100
    candidate = [0.0] * 8 + [1.0] * 12 + [1.0] * 80 + [0.0] * 100
    reason = decide(base, candidate).tasks[0].reason
    assert reason == (
        "lift +2.00 points, but its lower bound −1.78 does not exceed 0: "
        "at n = 200 that cannot be told from no change; about 1,550 documents would do"
    )


@pytest.mark.parametrize(
    ("right", "task", "words"),
    [
        (80, LIFT, "lift +30.00 points, and its lower bound"),
        (20, LIFT, "lift −30.00 points, and even its upper bound"),
        (20, GUARD, "lies below −2.00"),
        (50, GUARD, "at n = 100 a drop of 2.00 points cannot be told from 0; about 134 documents would do"),
        (49, LIFT, "if the change is what it seems, more documents would fail it"),
        (50, LIFT, "if the change is what it seems, no number of documents would decide"),
    ],
)
def test_reasons_name_what_decided(right: int, task: GateTask, words: str) -> None:
    verdict = decide(binary(50, 100), binary(right, 100), task)
    assert words in verdict.tasks[0].reason
    assert "quiz against base" in verdict.reason or verdict.state == "pass"


def test_an_undecided_guard_says_what_would_decide_it() -> None:
    base = [1.0] * 10 + [0.0] * 10 + [1.0] * 80 + [0.0] * 100
    candidate = [0.0] * 10 + [1.0] * 10 + [1.0] * 80 + [0.0] * 100
    assert decide(base, candidate, GUARD).tasks[0].reason == (
        "change 0 points, but its lower bound −3.87 does not exceed −2.00: "
        "at n = 200 a drop of 2.00 points cannot be told from 0; about 1,580 documents would do"
    )


def test_scores_that_are_no_fractions_are_shown_as_they_are() -> None:
    reason = decide([10.0, 12.0, 11.0] * 9, [15.0, 16.5, 15.5] * 9).tasks[0].reason
    assert reason.startswith("lift +4.667, and its lower bound +4.5")


def test_the_json_holds_every_figure() -> None:
    verdict = decide(binary(50, 100), binary(80, 100))
    record = json.loads(json.dumps(verdict_json(verdict), allow_nan=False))
    remarks = {"notes", "unpromoted", "scored_by", "judged_by", "trained_on"}
    assert set(record) == {"state", "gated", "reason", "tasks", *remarks}
    means = {"base", "parent", "candidate"}
    asked = {"task", "metric", "filter", "higher_is_better", "questions", "role", "against", "n"}
    decided = {"lift", "low", "high", "confidence", "threshold", "state", "reason"}
    found = {"method", "adjusted_low", "bootstrap_low", "bootstrap_high", "slices"}
    assert set(record["tasks"][0]) == {*asked, *means, *decided, *found}
    assert record["tasks"][0]["role"] == "lift"


def test_judging_and_checking_import_nothing_heavy() -> None:
    modules = [f"gate.{name}" for name in ("plugin", "spec", "procedure", "roles", "verdict", "sequential")]
    modules += [f"scoring.{name}" for name in ("checks", "scorecard", "cache")]
    imports = ", ".join(f"posttrain.{module}" for module in modules)
    heavy = "{'torch', 'numpy', 'scipy', 'transformers', 'datasets', 'peft', 'lm_eval'}"
    code = f"import sys, {imports}; print({heavy} & sys.modules.keys() or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_verdict_says_what_was_asked_and_what_decides() -> None:
    (task,) = decide(binary(50, 100), binary(90, 100), replace(LIFT, min_lift=0.1), confidence=0.9).tasks
    assert (task.filter, task.higher_is_better, task.confidence, task.threshold) == ("none", True, 0.9, 0.1)
    (guard,) = decide(binary(50, 100), binary(90, 100), GUARD).tasks
    assert guard.threshold == -0.02


@pytest.mark.parametrize(
    ("task", "n", "same"),
    [
        (LIFT, 100, True),
        (GUARD, 100, True),  # what a gate asks of a score does not change the score
        (LIFT, 99, False),
        (replace(LIFT, num_fewshot=5), 100, False),
        (replace(LIFT, chat=True), 100, False),
    ],
)
def test_scores_are_comparable_when_the_same_was_asked(task: GateTask, n: int, same: bool) -> None:
    (first,) = decide(binary(50, 100), binary(90, 100)).tasks
    (second,) = decide(binary(10, n), binary(20, n), task).tasks
    assert (first.questions == second.questions) is same
