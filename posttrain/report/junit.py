"""Verdicts as JUnit XML: a test case for every comparison.

A failure is the answer of a gate: failed or undecided. An error kept the gate from giving one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from posttrain.errors import PosttrainError
from posttrain.gate.spec import TaskVerdict, Verdict
from posttrain.quoting import document
from posttrain.report.run import RunReport, StageReport
from posttrain.report.scores import scale_of

GATED_ENDS = ("done", "warned", "gate_failed", "undecided")
"""States of a run that ended by the answer of its gates."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test case."""

    name: str
    outcome: str | None = None
    """``failure``, ``error`` or ``skipped``; None for a pass."""
    kind: str = ""
    message: str = ""
    output: str = ""


def junit(report: RunReport) -> str:
    """Return the verdicts of a run: a test suite for each stage, a case for each task and system compared with."""
    suites = [(stage, list(_cases(report, stage))) for stage in report.stages]
    return _document(report.run.recipe, suites, evidence=report.path.name)


def junit_error(name: str, error: PosttrainError) -> str:
    """Return one test case for a gate that failed before it asked anything, or could not judge."""
    kind = "failure" if error.exit_code in (3, 4) else "error"
    case = Case(name="gate", outcome=kind, kind=type(error).__name__, message=str(error))
    return _document(name, [(None, [case])])


def _cases(report: RunReport, stage: StageReport) -> Iterable[Case]:
    if stage.damage is not None:
        yield Case(name="stage", outcome="error", kind="ArtifactDamaged", message=stage.damage)
    elif stage.error is not None:
        yield Case(name="stage", outcome="error", kind="PluginFailed", message=stage.error)
    elif stage.verdict is not None and stage.verdict.tasks:
        yield from (_case(task, stage.verdict.recall(task.task)) for task in stage.verdict.tasks)
    elif stage.verdict is not None:
        yield _case_without_tasks(stage.verdict)
    elif stage.entry.state == "pending" or report.run.state in GATED_ENDS:
        yield Case(name="stage", outcome="skipped", message="the run stopped before this stage")
    else:
        yield Case(name="stage", outcome="error", kind=report.run.state, message=f"the run is {report.run.state}")


def _case(task: TaskVerdict, recall: str) -> Case:
    name = f"{task.role} {task.task} against {task.against}"
    scale = scale_of(task)
    shown = (
        f"{task.metric} {scale.score(task.candidate)}, {scale.interval(task.lift, task.low, task.high)}, n {task.n:,}"
    )
    shown += f", {recall}" if recall else ""
    if task.state == "pass":
        return Case(name=name, output=shown)
    kind = "failed" if task.state == "fail" else "undecided"
    return Case(name=name, outcome="failure", kind=kind, message=task.reason, output=shown)


def _case_without_tasks(verdict: Verdict) -> Case:
    """Return the case of a gate without tasks: switched off, or asking nothing."""
    if verdict.state == "pass":
        return Case(name="gate", outcome="skipped", message=verdict.reason)
    return Case(name="gate", outcome="failure", kind=verdict.state, message=verdict.reason)


def _document(name: str, suites: Sequence[tuple[StageReport | None, list[Case]]], evidence: str | None = None) -> str:
    """Return the XML; ``evidence`` names the folder behind the cases, apart for gates of one name."""
    counts = _counts([case for _, cases in suites for case in cases])
    root = ElementTree.Element("testsuites", {"name": document(name), **counts})
    for stage, cases in suites:
        title = name if stage is None else f"{name}.{stage.name}"
        suite = ElementTree.SubElement(root, "testsuite", {"name": document(title), **_counts(cases)})
        if stage is not None and stage.entry.seconds is not None:
            suite.set("time", str(stage.entry.seconds))
        _add_properties(suite, evidence, None if stage is None else stage.verdict)
        for case in cases:
            _append(suite, title, case)
    ElementTree.indent(root)
    text: str = ElementTree.tostring(root, encoding="unicode", xml_declaration=False)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _add_properties(suite: ElementTree.Element, evidence: str | None, verdict: Verdict | None) -> None:
    """Add the folder of the evidence, who scored, who judged, the notes of a verdict, and what it stands on."""
    named: dict[str, Sequence[str]] = {} if evidence is None else {"evidence": (evidence,)}
    if verdict is not None:
        named |= {"scored_by": verdict.scored_by, "judged_by": verdict.judged_by, "note": verdict.notes}
        named |= {"unpromoted": verdict.unpromoted}
    if any(named.values()):
        properties = ElementTree.SubElement(suite, "properties")
        for name, values in named.items():
            for value in values:
                ElementTree.SubElement(properties, "property", name=name, value=document(value))


def _append(suite: ElementTree.Element, title: str, case: Case) -> None:
    element = ElementTree.SubElement(suite, "testcase", classname=document(title), name=document(case.name))
    if case.outcome is not None:
        outcome = ElementTree.SubElement(element, case.outcome, message=document(case.message))
        if case.kind:
            outcome.set("type", document(case.kind))
    if case.output:
        ElementTree.SubElement(element, "system-out").text = document(case.output)


def _counts(cases: list[Case]) -> dict[str, str]:
    outcomes = [case.outcome for case in cases]
    numbers = {"tests": len(cases), "failures": outcomes.count("failure"), "errors": outcomes.count("error")}
    return {name: str(number) for name, number in {**numbers, "skipped": outcomes.count("skipped")}.items()}
