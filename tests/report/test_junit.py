"""Verdicts as JUnit XML and as Markdown for a pull request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import ArtifactDamaged, BadInput, GateFailed, GateUndecided, PosttrainError, Problem
from posttrain.gate.spec import DocumentScore, Verdict, VerdictState
from posttrain.report.junit import junit, junit_error
from posttrain.report.run import RunReport, StageReport
from posttrain.report.summary import MOST_BYTES, summary, summary_error
from posttrain.run.directory import RunState, StageState
from posttrain.scoring.scorecard import Shown
from tests.support.judgements import task_verdict


def stage(name: str, state: str, verdict: Verdict | None = None, **settings: Any) -> StageReport:
    return StageReport(entry=StageState(name=name, kind=name, state=state, seconds=12.5), verdict=verdict, **settings)


def verdict(*states: VerdictState, **settings: Any) -> Verdict:
    tasks = tuple(replace(task_verdict(state), task=f"task{n}", **settings) for n, state in enumerate(states))
    return Verdict(state=states[0], gated=True, tasks=tasks, reason="because")


def report(state: str, *stages: StageReport) -> RunReport:
    return RunReport(
        path=Path("run"), run=RunState(recipe="mine", state=state, stages=[s.entry for s in stages]), stages=stages
    )


def outcomes(text: str) -> dict[str, tuple[str, str | None, str | None]]:
    """Per test case: how it ended, with type and message."""
    found = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        ends = [child for child in case if child.tag != "system-out"] or [ElementTree.Element("passed")]
        found[f"{case.get('classname')}: {case.get('name')}"] = (
            ends[0].tag,
            ends[0].get("type"),
            ends[0].get("message"),
        )
    return found


def test_every_comparison_is_a_case_and_failure_is_not_error() -> None:
    run = report(
        "failed",
        stage("sft", "promoted", verdict("pass", "pass")),
        stage("dpo", "gate_failed", verdict("fail", "undecided", "pass")),
        stage("kto", "running", error="RuntimeError: no memory"),
        stage("orpo", "pending"),
    )
    text = junit(run)
    assert outcomes(text) == {
        "mine.sft: lift task0 against base": ("passed", None, None),
        "mine.sft: lift task1 against base": ("passed", None, None),
        "mine.dpo: lift task0 against base": ("failure", "failed", "because"),
        "mine.dpo: lift task1 against base": ("failure", "undecided", "because"),
        "mine.dpo: lift task2 against base": ("passed", None, None),
        "mine.kto: stage": ("error", "PluginFailed", "RuntimeError: no memory"),
        "mine.orpo: stage": ("skipped", None, "the run stopped before this stage"),
    }
    root = ElementTree.fromstring(text)
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "7", "failures": "2", "errors": "1", "skipped": "1",
    }  # fmt: skip
    suites = {suite.get("name"): suite.attrib for suite in root.iter("testsuite")}
    assert suites["mine.dpo"] | {"failures": "2", "errors": "0", "time": "12.5"} == suites["mine.dpo"]


def test_a_gate_that_did_not_ask_is_not_a_pass() -> None:
    off = Verdict(state="pass", gated=False, tasks=(), reason="switched off")
    asks_nothing = Verdict(state="undecided", gated=True, tasks=(), reason="asks nothing")
    run = report("undecided", stage("sft", "promoted", off), stage("dpo", "undecided", asks_nothing))
    assert outcomes(junit(run)) == {
        "mine.sft: gate": ("skipped", None, "switched off"),
        "mine.dpo: gate": ("failure", "undecided", "asks nothing"),
    }
    interrupted = report("interrupted", stage("sft", "running"))
    assert outcomes(junit(interrupted))["mine.sft: stage"][0] == "error"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (GateFailed("worse"), "failure"),
        (GateUndecided("few"), "failure"),
        (ArtifactDamaged("torn"), "error"),
        (BadInput(Problem(where="a", what="b")), "error"),
        (PosttrainError("bug"), "error"),
    ],
)
def test_the_answer_of_a_gate_is_a_failure_and_all_else_an_error(error: PosttrainError, outcome: str) -> None:
    (case,) = outcomes(junit_error("quick", error)).values()
    assert case == (outcome, type(error).__name__, str(error))


@given(st.text())
def test_whatever_a_reason_holds_the_document_is_sound(text: str) -> None:
    failing = Verdict(state="fail", gated=True, tasks=(replace(task_verdict("fail"), reason=text),), reason=text)
    run = report("gate_failed", stage("sft", "gate_failed", failing))
    data = junit(run).encode("utf-8")
    (case,) = outcomes(data.decode()).values()
    assert case[0] == "failure"
    assert summary(run, []).encode("utf-8")


def row(system: str, doc_id: int, score: float, response: str = "answer") -> DocumentScore:
    return DocumentScore(
        system=system, digest=system, task="task0", filter="none", doc_id=doc_id, document_hash="d", request_hash="r",
        target_hash="t", metrics={"acc": score}, response=response, target="wanted",
    )  # fmt: skip


def test_a_summary_says_the_verdict_first_and_shows_what_got_worse() -> None:
    rows = [row("base", 0, 1.0, "right"), row("candidate", 0, 0.0, "<b>| @all\n`x`"), row("base", 1, 0.0)]
    text = summary(
        report("gate_failed", stage("sft", "gate_failed", verdict("fail"))),
        [*rows, row("candidate", 1, 1.0)],
        {("task0", 0): Shown("task0", 0, "which flag?", "questions.jsonl:17")},
    )
    assert text.splitlines()[0] == "### ❌ failed: sft, gate mine"
    assert "| task0 (lift, n 100) | 10.0 | 10.0 | 60.0 | +50.0 \\[+40.0, +60.0\\] vs base | fail |" in text
    assert "- because" in text
    assert "1 got worse, 1 better" in text
    assert "Next: Look at the answers that got worse." in text
    assert "| questions.jsonl:17 | which flag? | right | &lt;b>\\| &#64;all \\`x\\` | wanted |" in text
    assert "| 1 |" not in text
    failed = report("gate_failed", stage("sft", "gate_failed", verdict("fail")))
    assert "| 0 | which flag? | right" in summary(failed, rows[:2], {("task0", 0): Shown("task0", 0, "which flag?")})


def test_a_summary_says_that_it_shows_the_first_of_many() -> None:
    failed = report("gate_failed", stage("sft", "gate_failed", verdict("fail")))
    for number, words in (
        (10, "10 got worse, 0 better</summary>"),
        (11, "11 got worse, 0 better; the first 10</summary>"),
    ):
        systems = ("base", 1.0), ("candidate", 0.0)
        text = summary(failed, [row(system, each, score) for system, score in systems for each in range(number)])
        assert words in text
        assert text.count("| answer | answer | wanted |") == 10


def test_a_summary_has_a_limit() -> None:
    tasks = tuple(replace(task_verdict("pass"), task=f"{n} {'é' * 3000}") for n in range(100))
    long = Verdict(state="pass", gated=True, tasks=tasks, reason="because")
    text = summary(report("done", stage("sft", "promoted", long)), [])
    assert MOST_BYTES / 2 < len(text.encode()) <= MOST_BYTES
    assert text.startswith("### ✅ passed")
    assert "the rest is left out" in text


def test_a_gate_without_a_table_says_why() -> None:
    assert summary_error("quick", "v2", "every lora_B is zero", 3).startswith("### ❌ failed: v2, gate quick")
    assert "not judged" in summary_error("quick", "v2", "damaged", 5)
