"""From scores to a verdict.

A lift passes when the lower bound of the paired difference exceeds ``min_lift``; a guard passes when that bound
exceeds ``-max_drop``; a limit passes when the bound of the candidate's own score lies on the good side of
``threshold``. Anything in between is undecided, and so is a gate that asks nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Sequential
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.gate.comparison import Comparison, Decision, decide, list_comparisons
from posttrain.gate.evidence import Mean
from posttrain.gate.matching import match_scores
from posttrain.gate.reasons import reason
from posttrain.gate.sequential import Look, make_looks
from posttrain.gate.spec import Comparator, GateRequest, Scorecard, TaskVerdict, Verdict, worst

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig


def judge(request: GateRequest, scorecard: Scorecard) -> Verdict:
    """Judge the candidate.

    Raises ArtifactDamaged when a score is missing, doubled, not finite or stale, or when two systems were not asked the
    same.
    """
    if not request.gate.enabled:
        return Verdict(state="pass", gated=False, tasks=(), reason="the recipe switched this gate off")
    asked, decisions = _decide_all(request, scorecard)
    if not asked:
        return Verdict(state="undecided", gated=True, tasks=(), reason="this gate asks nothing, so nothing can pass it")
    verdicts = [_verdict(*found, request.gate) for found in zip(asked, decisions, strict=True)]
    return Verdict(
        state=worst(decision.state for decision in decisions),
        gated=True,
        tasks=tuple(verdicts),
        reason=_summary(verdicts),
    )


def plan_looks(request: GateRequest) -> list[Look]:
    """Return the looks of a gate: a single one, unless it is sequential and every compared system is scored here."""
    sequential = request.gate.sequential is Sequential.obrien_fleming and set(_comparators(request)) <= set(
        request.systems
    )
    return make_looks(request.gate.looks if sequential else 1)


def is_settled(request: GateRequest, scorecard: Scorecard) -> bool:
    """Return whether a gate may stop at the scorecard's look: it is decided, or can hardly pass any more."""
    _, decisions = _decide_all(request, scorecard)
    if scorecard.look.last or worst(decision.state for decision in decisions) != "undecided":
        return True
    return any(decision.hopeless for decision in decisions)


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """Return the verdict as JSON values, in the form of verdict.json."""
    return {
        "state": verdict.state,
        "gated": verdict.gated,
        "reason": verdict.reason,
        "unpromoted": list(verdict.unpromoted),
        "tasks": [asdict(task) for task in verdict.tasks],
    }


def write_verdict(path: Path, verdict: Verdict, **more: str) -> None:
    """Write a verdict.json in one step; ``more`` are further keys of the file."""
    replace_text(path, json.dumps({**verdict_json(verdict), **more}, indent=2) + "\n")


def read_verdict(path: Path) -> Verdict:
    """Read a verdict.json. Raises ArtifactDamaged when the file does not hold a verdict."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        tasks = tuple(TaskVerdict(**task) for task in record["tasks"])
        numbers = [value for task in tasks for value in asdict(task).values() if isinstance(value, float | int)]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("a figure is not finite")
        return Verdict(
            state=record["state"], gated=record["gated"], tasks=tasks, reason=record["reason"],
            unpromoted=tuple(record["unpromoted"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactDamaged(f"{path} does not hold a verdict: {error}") from None


def _decide_all(request: GateRequest, scorecard: Scorecard) -> tuple[list[Comparison], list[Decision]]:
    against = _comparators(request)
    if not against:
        return [], []
    asked = list_comparisons(request.gate, match_scores(request, scorecard), against)
    return asked, decide(asked, request.gate.confidence, scorecard.look)


def _comparators(request: GateRequest) -> list[Comparator]:
    """Return the systems to compare with; a parent that is the base counts once, as the base."""
    wanted: list[Comparator] = []
    for name in request.gate.against:
        comparator: Comparator = "parent" if name == "parent" and "parent" in request.systems else "base"
        if comparator not in wanted:
            wanted.append(comparator)
    return wanted


def _verdict(comparison: Comparison, decision: Decision, gate: GateConfig) -> TaskVerdict:
    evidence, means = comparison.evidence, comparison.means
    bootstrap = evidence.bootstrap(gate.confidence, gate.seed) if isinstance(evidence, Mean) else None
    return TaskVerdict(
        task=comparison.name,
        metric=comparison.metric,
        filter=comparison.filter,
        higher_is_better=comparison.higher_is_better,
        questions=comparison.questions,
        role=comparison.role.value,
        against=comparison.against,
        n=evidence.n if evidence is not None else 0,
        base=means["base"],
        parent=means.get("parent", means["base"]),
        candidate=means["candidate"],
        lift=evidence.mean if evidence is not None else 0.0,
        low=decision.bounds.low,
        high=decision.bounds.high,
        confidence=decision.confidence,
        threshold=comparison.threshold,
        state=decision.state,
        reason=reason(comparison, decision, gate.confidence),
        method=evidence.method if evidence is not None else "",
        adjusted_low=decision.adjusted_low,
        bootstrap_low=bootstrap.low if bootstrap is not None else None,
        bootstrap_high=bootstrap.high if bootstrap is not None else None,
    )


def _summary(verdicts: Sequence[TaskVerdict]) -> str:
    state = worst(verdict.state for verdict in verdicts)
    if state == "pass":
        return "every task passed"
    deciding = [verdict for verdict in verdicts if verdict.state == state]
    return "; ".join(f"{verdict.task} against {verdict.against}: {verdict.reason}" for verdict in deciding)
