"""What a gate asks beyond one paired difference: limits, several lifts, pooled guards, documents that share sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.artifact import BaseWeights
from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import Scorecard, TaskVerdict, Verdict
from posttrain.gate.statistics import exact_share_bounds, holm, tango_bounds
from posttrain.gate.verdict import judge
from posttrain.host.plugins import CORE_ORIGIN
from posttrain.ledger import Judgement
from posttrain.report.intervals import intervals
from posttrain.run.verdict import confirmed_verdict, write_verdict
from tests.support.gates import GUARD, LIFT, binary, card_of, decide, paired_scores, request, request_of, rows

LIMIT = GateTask(role=Role.limit, metric="acc", threshold=0.9)


def by_name(verdict: Verdict) -> dict[tuple[str, str], TaskVerdict]:
    return {(task.task, task.against): task for task in verdict.tasks}


@pytest.mark.parametrize(("right", "state"), [(198, "pass"), (184, "undecided"), (150, "fail")])
def test_a_limit_holds_the_candidates_own_score_to_a_threshold(right: int, state: str) -> None:
    (task,) = decide(binary(0, 200), binary(right, 200), LIMIT).tasks
    assert (task.state, task.against, task.role) == (state, "threshold", "limit")
    assert task.low == pytest.approx(exact_share_bounds(right, 200, 0.95).low - 0.9)
    assert task.lift == pytest.approx(right / 200 - 0.9)


@pytest.mark.parametrize(("attacks", "state"), [(2, "pass"), (16, "undecided"), (50, "fail")])
def test_a_limit_on_what_should_be_rare_is_an_upper_one(attacks: int, state: str) -> None:
    asked = request_of({"attack": replace(LIMIT, threshold=0.1)})
    scores = {"attack": {"base": binary(0, 200), "candidate": binary(attacks, 200)}}
    (task,) = judge(asked, card_of(scores, higher_is_better={"attack": False})).tasks
    assert task.state == state
    assert task.candidate == attacks / 200
    assert task.high == pytest.approx(0.1 - exact_share_bounds(attacks, 200, 0.95).low)


@pytest.mark.parametrize(
    ("right", "words"),
    [
        (198, "score 99.00, and its lower bound 96.89 lies above 90.00 (n = 200)"),
        (150, "score 75.00, and even its upper bound 79.98 lies below 90.00 (n = 200)"),
        (184, "at n = 200 that cannot be told from 90.00; about 1,140 documents would do"),
        (178, "if the change is what it seems, more documents would fail it"),
    ],
)
def test_the_reason_of_a_limit_speaks_of_the_score(right: int, words: str) -> None:
    assert words in decide(binary(0, 200), binary(right, 200), LIMIT).tasks[0].reason


def test_a_limit_on_other_scores_speaks_of_them_as_they_are() -> None:
    scores = {"loss": {"base": [9.0] * 40, "candidate": np.random.default_rng(0).normal(2.0, 0.3, 40).tolist()}}
    asked = request_of({"loss": replace(LIMIT, threshold=2.5)})
    (task,) = judge(asked, card_of(scores, higher_is_better={"loss": False})).tasks
    assert task.state == "pass"
    assert "lies below 2.5" in task.reason
    assert judge(asked, card_of(scores)).state == "fail"


def test_a_limit_is_asked_once_whatever_the_gate_compares_with() -> None:
    systems = ("base", "parent", "candidate")
    asked = request_of({"quiz": LIMIT, "other": LIFT}, systems)
    scores = {system: binary(198, 200) for system in systems}
    assert set(by_name(judge(asked, card_of({"quiz": scores, "other": scores})))) == {
        ("quiz", "threshold"),
        ("other", "base"),
        ("other", "parent"),
    }


def test_several_lifts_are_held_to_holms_correction() -> None:
    """Alone each lift passes at 95 %; together the smaller one has to wait for the larger one."""
    strong, weak = paired_scores(60, 20, 400), paired_scores(52, 35, 400)
    asked = request_of({"strong": LIFT, "weak": LIFT})
    verdict = judge(asked, card_of({"strong": strong, "weak": weak}))
    lows = [tango_bounds(60, 20, 400, 0.95).low, tango_bounds(52, 35, 400, 0.95).low]
    assert min(lows) > 0
    assert verdict.state == "pass"
    both_weak = judge(asked, card_of({"strong": weak, "weak": weak}))
    assert both_weak.state == "undecided"
    task = both_weak.tasks[0]
    assert task.low > 0
    assert task.adjusted_low == pytest.approx(tango_bounds(52, 35, 400, 0.975).low)
    assert task.adjusted_low < 0
    assert "exceeds 0 by itself, but not with Holm's correction for 2 lifts (bound −0.33)" in task.reason
    assert judge(request_of({"weak": LIFT}), card_of({"weak": weak})).state == "pass"


def test_adjusted_bounds_are_those_of_holm_and_only_of_lifts() -> None:
    tables = {"a": (60, 20, 400), "b": (52, 35, 400), "c": (40, 40, 400)}
    asked = request_of({**dict.fromkeys(tables, LIFT), "guard": replace(GUARD, max_drop=0.1)})
    scores = {name: paired_scores(*table) for name, table in tables.items()}
    found = by_name(judge(asked, card_of({**scores, "guard": paired_scores(10, 10, 400)})))
    lows = [lambda confidence, table=table: tango_bounds(*table, confidence).low for table in tables.values()]
    expected = holm(lows, [0.0] * 3, 0.95)
    assert [found[name, "base"].adjusted_low for name in tables] == [pytest.approx(claim.low) for claim in expected]
    assert [found[name, "base"].state == "pass" for name in tables] == [claim.passed for claim in expected]
    assert found["guard", "base"].adjusted_low is None


def test_lifts_over_base_and_parent_are_two_families() -> None:
    systems = ("base", "parent", "candidate")
    scores = paired_scores(52, 35, 400)
    three = {"base": scores["base"], "parent": scores["base"], "candidate": scores["candidate"]}
    verdict = judge(request_of({"one": LIFT}, systems), card_of({"one": three}))
    assert [task.adjusted_low for task in verdict.tasks] == [None, None]
    assert verdict.state == "pass"


def test_small_losses_on_every_guard_add_up_in_the_pool() -> None:
    """Four losses of 3.5 points each: every guard alone is far from its limit of 10, all together show a loss."""
    guards = {f"guard{number}": GateTask(role=Role.guard, metric="acc") for number in range(4)}
    scores = {name: paired_scores(11, 25, 400) for name in guards}
    alone = judge(request_of({name: replace(task, max_drop=0.1) for name, task in guards.items()}), card_of(scores))
    assert alone.state == "pass"
    pooled = judge(request_of(guards, pooled_max_drop=0.01), card_of(scores))
    assert {task.state for task in pooled.tasks[:-1]} == {"pass"}
    assert pooled.tasks[-1].threshold == -0.01
    assert (pooled.tasks[-1].task, pooled.tasks[-1].state, pooled.tasks[-1].n) == ("guards", "fail", 1600)
    assert pooled.tasks[-1].lift == pytest.approx(-0.035)
    assert pooled.state == "fail"


def test_the_pool_decides_what_no_guard_alone_could() -> None:
    guards = {f"guard{number}": GateTask(role=Role.guard, metric="acc", max_drop=0.1) for number in range(4)}
    scores = {name: paired_scores(20, 20, 400) for name in guards}
    assert judge(request_of(guards, pooled_max_drop=0.02), card_of(scores)).state == "pass"
    strict = {name: replace(task, max_drop=0.02) for name, task in guards.items()}
    assert judge(request_of(strict), card_of(scores)).state == "undecided"


def test_a_catastrophe_on_one_guard_is_refused_though_the_pool_gained() -> None:
    guards = {f"guard{number}": GateTask(role=Role.guard, metric="acc") for number in range(4)}
    scores = {name: paired_scores(120, 10, 400) for name in guards} | {"guard3": paired_scores(0, 100, 400)}
    found = by_name(judge(request_of(guards, pooled_max_drop=0.02), card_of(scores)))
    assert found["guards", "base"].state == "pass"
    assert found["guard3", "base"].state == "fail"


def test_the_pool_is_compared_with_base_and_with_parent_so_that_losses_cannot_add_up() -> None:
    guards = {f"guard{number}": GateTask(role=Role.guard, metric="acc") for number in range(3)}
    base, parent, candidate = binary(400, 800), binary(394, 800), binary(388, 800)
    scores = {name: {"base": base, "parent": parent, "candidate": candidate} for name in guards}
    asked = request_of(guards, ("base", "parent", "candidate"), pooled_max_drop=0.014)
    found = by_name(judge(asked, card_of(scores)))
    assert found["guards", "parent"].state == "pass"
    assert found["guards", "base"].state != "pass"


def test_guards_that_are_no_shares_stand_alone() -> None:
    guards = {"acc": GateTask(role=Role.guard, metric="acc"), "loss": GateTask(role=Role.guard, metric="acc")}
    losses = np.random.default_rng(1).normal(20.0, 5.0, 400)
    scores = {"acc": paired_scores(5, 5, 400), "loss": {"base": losses.tolist(), "candidate": (losses - 0.5).tolist()}}
    asked = request_of(guards, pooled_max_drop=0.03)
    verdict = judge(asked, card_of(scores, higher_is_better={"acc": True, "loss": False}))
    assert verdict.tasks[-1].n == 400
    assert verdict.tasks[-1].method.startswith("1 task")


def test_the_pool_turns_guards_around_whose_less_is_better() -> None:
    guards = {"right": GateTask(role=Role.guard, metric="acc"), "wrong": GateTask(role=Role.guard, metric="acc")}
    scores = {"right": paired_scores(0, 40, 400), "wrong": paired_scores(0, 40, 400)}
    asked = request_of(guards, pooled_max_drop=0.02)
    pool = judge(asked, card_of(scores, higher_is_better={"right": True, "wrong": False})).tasks[-1]
    assert pool.lift == pytest.approx(0)
    assert pool.base == pytest.approx((0.55 + 1 - 0.55) / 2)


def test_without_documents_the_pool_decides_nothing() -> None:
    verdict = decide([], [], GUARD, pooled_max_drop=0.02)
    assert [task.state for task in verdict.tasks] == ["undecided", "undecided"]


def test_documents_that_share_a_source_count_less() -> None:
    """The same answers, once with 200 sources and once with 20: what one source got right tells little about others."""
    base, candidate = binary(0, 200), [1.0] * 30 + [0.0] * 170
    task = replace(LIFT, cluster="page")
    parts = rows("base", base), rows("candidate", candidate)

    def judged(sources: int) -> TaskVerdict:
        clusters = {"quiz": {document: str(document * sources // 200) for document in range(200)}}
        found = Scorecard(rows=(*parts[0], *parts[1]), higher_is_better={"quiz": True}, clusters=clusters)
        return judge(request(task), found).tasks[0]

    many, few = judged(200), judged(20)
    assert (many.state, few.state) == ("pass", "pass")
    assert many.low == tango_bounds(30, 0, 200, 0.95).low
    assert few.low < many.low / 2
    assert "(n = 200 from 20 sources)" in few.reason
    assert few.method == "Student's t over 20 clusters, corrected for skewness"
    assert judged(7).state == "undecided"


def test_a_scorecard_that_does_not_name_the_sources_is_refused() -> None:
    parts = rows("base", binary(0, 9)), rows("candidate", binary(9, 9))
    found = Scorecard(rows=(*parts[0], *parts[1]), higher_is_better={"quiz": True}, clusters={"quiz": {0: "a"}})
    with pytest.raises(ArtifactDamaged, match="the source of document 1"):
        judge(request(replace(LIFT, cluster="page")), found)


def test_scores_that_are_not_right_or_wrong_have_bootstrap_bounds_beside_those_that_decide() -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(10, 2, 80)
    (task,) = decide(base.tolist(), (base + generator.normal(1, 1, 80)).tolist()).tasks
    assert task.bootstrap_low == pytest.approx(task.low, abs=0.05)
    assert task.bootstrap_high == pytest.approx(task.high, abs=0.05)
    assert decide(binary(1, 9), binary(5, 9)).tasks[0].bootstrap_low is None


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (GateTask(role=Role.limit, metric="acc"), ("threshold", "a limit needs a threshold")),
        (replace(LIMIT, threshold=float("nan")), ("threshold", "nan is not finite")),
        (replace(LIFT, threshold=0.5), ("threshold", "a lift has no threshold")),
        (replace(GUARD, min_lift=0.1), ("min_lift", "a guard has no min_lift")),
        (replace(GUARD, max_drop=-0.1), ("max_drop", "-0.1 is negative")),
        (replace(GUARD, max_drop=float("nan")), ("max_drop", "nan is not finite")),
        (replace(GUARD, max_drop=float("inf")), ("max_drop", "inf is not finite")),
    ],
)
def test_settings_that_contradict_a_role_are_named(task: GateTask, problem: tuple[str, str]) -> None:
    assert problem in task.problems()


@pytest.mark.parametrize(
    "task", [LIFT, GUARD, LIMIT, replace(LIMIT, threshold=-3.0), replace(LIFT, min_lift=-1.0, max_drop=0.1)]
)
def test_settings_of_a_role_are_no_problem(task: GateTask) -> None:
    assert not task.problems()


def test_guards_of_a_pool_are_limits_for_catastrophes() -> None:
    unset = GateTask(role=Role.guard, metric="acc")
    assert GateConfig().allowed_drop(unset) == 0.02
    assert GateConfig(pooled_max_drop=0.01).allowed_drop(unset) == 0.1
    assert GateConfig(pooled_max_drop=0.01).allowed_drop(GUARD) == 0.02


def test_reports_and_ledger_take_every_kind_of_comparison(tmp_path: Path) -> None:
    """A limit, two lifts, a guard of other scores and a pool: what is written is read, and shown, as it was."""
    generator = np.random.default_rng(3)
    tasks = {"limit": LIMIT, "first": LIFT, "second": LIFT, "guard": replace(GUARD, max_drop=0.1), "loss": GUARD}
    loss = generator.normal(20, 3, 400)
    scores = {name: paired_scores(60, 20, 400) for name in tasks} | {
        "loss": {"base": loss.tolist(), "candidate": (loss - generator.normal(1, 1, 400)).tolist()}
    }
    card = card_of(scores, higher_is_better={**dict.fromkeys(tasks, True), "loss": False})
    asked = request_of(tasks, pooled_max_drop=0.02)
    verdict = replace(judge(asked, card), judged_by=(CORE_ORIGIN,))
    write_verdict(tmp_path / "verdict.json", verdict, [asked], card)
    assert confirmed_verdict(tmp_path / "verdict.json").verdict == verdict
    shown = {line.task.task: line.note for line in intervals(verdict.tasks)}
    assert shown["limit"] == "Clopper and Pearson's exact interval"
    assert shown["first"].startswith("Tango's score interval; > +")
    assert "corrected for skewness; bootstrap [+" in shown["loss"]
    assert shown["guards"] == "1 task with equal weight, their bounds combined"
    judgement = Judgement(
        run="r", recipe="mine", stage="sft", lineage=("sft",), base=BaseWeights(name="base", digest="weights"),
        parent="p", artifact="d", verdict=verdict,
    )  # fmt: skip
    assert [lift.against for lift in judgement.lifts("now", "me")] == ["threshold", *["base"] * 5]
