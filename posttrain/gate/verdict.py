"""From scores to a verdict.

A lift passes when the lower bound of the paired difference exceeds ``min_lift``; a guard passes when that bound
exceeds ``-max_drop``; a limit passes when the bound of the candidate's own score lies on the good side of
``threshold``. Anything in between is undecided, and so is a gate that asks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Sequential
from posttrain.gate.comparison import Comparison, Decision, decide, list_comparisons
from posttrain.gate.evidence import Mean
from posttrain.gate.halves import hold_back
from posttrain.gate.matching import match_scores
from posttrain.gate.reasons import copies, idle, of_choice, reason, weaknesses
from posttrain.gate.sequential import Look, make_looks
from posttrain.gate.slices import bound_parts, drivers
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
    weak = [*of_choice(request.gate), *weaknesses(request.gate, request.tasks)]
    if not asked:
        nothing = "this gate asks nothing, so nothing can pass it"
        return Verdict(state="undecided", gated=True, tasks=(), reason=nothing, notes=tuple(weak))
    verdicts = [_verdict(*found, request.gate) for found in zip(asked, decisions, strict=True)]
    verdict = Verdict(
        state=worst(decision.state for decision in decisions),
        gated=True,
        tasks=tuple(verdicts),
        reason=_summary(verdicts),
        notes=tuple(
            dict.fromkeys(
                [
                    *(sentence for verdict in verdicts for sentence in drivers(verdict)),
                    *weak,
                    *(note for each in asked for note in (idle(each), copies(each)) if note),
                ]
            )
        ),
    )
    return hold_back(request.gate, verdict)


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


def join(verdicts: Sequence[Verdict]) -> Verdict:
    """Join verdicts about one candidate into one, in the worst of their states."""
    first = verdicts[0]
    state = worst(verdict.state for verdict in verdicts)
    deciding = dict.fromkeys(verdict.reason for verdict in verdicts if verdict.state == state)
    return Verdict(
        state=state,
        gated=first.gated,
        tasks=tuple(task for verdict in verdicts for task in verdict.tasks),
        reason="; ".join(deciding),
        unpromoted=first.unpromoted,
        notes=tuple(dict.fromkeys(note for verdict in verdicts for note in verdict.notes)),
        scored_by=first.scored_by,
        judged_by=first.judged_by,
    )


def verdict_json(verdict: Verdict, *, decision_only: bool = False) -> dict[str, Any]:
    """Return the verdict as JSON values, in the form of verdict.json; or the decision without its remarks."""
    values = asdict(verdict)
    return {key: values[key] for key in ("state", "gated", "reason", "tasks")} if decision_only else values


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
        comparator: Comparator = "base"
        if name in ("parent", "baseline") and name in request.systems:
            comparator = name  # type: ignore[assignment]
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
        parent=means.get("parent", means.get("baseline", means["base"])),
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
        slices=bound_parts(comparison.parts, decision.confidence),
    )


def _summary(verdicts: Sequence[TaskVerdict]) -> str:
    state = worst(verdict.state for verdict in verdicts)
    if state == "pass":
        return "every task passed"
    deciding = [verdict for verdict in verdicts if verdict.state == state]
    return "; ".join(f"{verdict.task} against {verdict.against}: {verdict.reason}" for verdict in deciding)
