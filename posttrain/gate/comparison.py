"""The questions of a gate and their answers: per task and system, per threshold, and for all guards together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from posttrain.config.schema import Role
from posttrain.digests import digest_of
from posttrain.gate.evidence import Evidence, Pool, measure_distance, pair_scores
from posttrain.gate.roles import RULES
from posttrain.gate.sequential import Look, is_hopeless
from posttrain.gate.slices import Part, cut, cut_limit
from posttrain.gate.spec import Comparator, VerdictState
from posttrain.gate.statistics import Bounds, LowAt, holm

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig
    from posttrain.gate.matching import TaskScores

POOL = "guards"
"""Name of all guards together."""
POOLED = "mean of tasks"
"""Their metric."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One question to the scores."""

    name: str
    metric: str
    filter: str
    higher_is_better: bool
    questions: str
    role: Role
    against: Comparator
    evidence: Evidence | None
    """None when there are no documents."""
    threshold: float
    """Value for the lower bound of the evidence to exceed."""
    limit: float | None = None
    """Threshold of a limit on the scale of the scores; ``threshold`` is then 0, for the distance from it."""
    means: Mapping[str, float]
    """Mean score of every system."""
    fractions: bool
    """True when the scores lie between 0 and 1, so that changes are shown in percentage points."""
    documents: int
    """Number of scored documents, equal ones included; the evidence counts distinct ones."""
    parts: tuple[Part, ...] = ()
    """The evidence of single slices."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The answer to one comparison."""

    state: VerdictState
    bounds: Bounds
    confidence: float
    """Confidence of either bound. Early looks need more than the gate's, so that all looks together keep it."""
    family: int = 1
    """Number of lifts corrected together."""
    adjusted_low: float | None = None
    hopeless: bool = False
    """True when a sequential gate may stop because this can hardly pass any more."""


def list_comparisons(gate: GateConfig, tasks: Sequence[TaskScores], against: Sequence[Comparator]) -> list[Comparison]:
    """List all questions, task by task; the pooled guards come last."""
    found = []
    for task in tasks:
        if RULES[task.task.role].paired:
            found += [_paired(gate, task, system) for system in against]
        else:
            found.append(_limit(gate, task))
    guards = [task for task in tasks if RULES[task.task.role].pools and task.fractions]
    if gate.pooled_max_drop is not None and guards:
        found += [_pooled(gate.pooled_max_drop, guards, system) for system in against]
    return found


def decide(asked: Sequence[Comparison], confidence: float, look: Look) -> list[Decision]:
    """Answer every question; lifts over the same system are corrected together."""
    alone = [_decide_alone(comparison, confidence, look) for comparison in asked]
    # Guards and limits need no correction: all of them have to pass, and that only ever makes a pass rarer.
    for system in {comparison.against for comparison in asked}:
        lifts = [i for i, each in enumerate(asked) if RULES[each.role].shares_error and each.against == system]
        if len(lifts) > 1:
            for i, decision in zip(lifts, _decide_together([asked[i] for i in lifts], confidence, look), strict=True):
                alone[i] = decision
    return alone


def _paired(gate: GateConfig, task: TaskScores, system: Comparator) -> Comparison:
    threshold = RULES[task.task.role].least(gate, task.task)
    found = _comparison(task, against=system, evidence=_difference(task, system), threshold=threshold)
    return replace(found, parts=cut(task, *_oriented(task, system)))


def _difference(task: TaskScores, system: Comparator) -> Evidence | None:
    return pair_scores(*_oriented(task, system), task.clusters) if task.scores["candidate"] else None


def _oriented(task: TaskScores, system: Comparator) -> tuple[Sequence[float], Sequence[float]]:
    """Return the scores whose difference is the lift: where less is better, the systems are exchanged."""
    new, old = task.scores["candidate"], task.scores[system]
    return (new, old) if task.higher_is_better else (old, new)


def _limit(gate: GateConfig, task: TaskScores) -> Comparison:
    scores, limit = task.scores["candidate"], task.task.threshold
    if limit is None:
        raise ValueError(f"{task.name} is a limit without a threshold")
    evidence = (
        measure_distance(scores, limit, higher_is_better=task.higher_is_better, clusters=task.clusters)
        if scores
        else None
    )
    found = _comparison(task, against="threshold", evidence=evidence, threshold=0.0, limit=limit)
    return replace(found, parts=cut_limit(task, scores, limit))


def _comparison(
    task: TaskScores, *, against: Comparator, evidence: Evidence | None, threshold: float, limit: float | None = None
) -> Comparison:
    return Comparison(
        name=task.name,
        metric=task.task.metric,
        filter=task.filter,
        higher_is_better=task.higher_is_better,
        questions=task.questions,
        role=task.task.role,
        against=against,
        evidence=evidence,
        threshold=threshold,
        limit=limit,
        means={system: fmean(found) if found else 0.0 for system, found in task.scores.items()},
        fractions=task.fractions,
        documents=task.documents,
    )


def _pooled(allowed: float, guards: Sequence[TaskScores], system: Comparator) -> Comparison:
    """Compare all guards together: small losses on each could add up to a large one that no single guard sees."""
    parts = [part for task in guards if (part := _difference(task, system)) is not None]
    return Comparison(
        name=POOL,
        metric=POOLED,
        filter="",
        higher_is_better=True,
        questions=digest_of([task.questions for task in guards]),
        role=Role.guard,
        against=system,
        evidence=Pool(parts, _correlations(guards)) if len(parts) == len(guards) else None,
        threshold=-allowed,
        means={name: fmean(_share(task, name) for task in guards) for name in guards[0].scores},
        fractions=True,
        documents=sum(task.documents for task in guards),
    )


def _correlations(tasks: Sequence[TaskScores]) -> list[list[float]] | None:
    """Return the largest correlations that common documents can cause between the means of tasks; None for none."""
    found = [[1.0 if one is other else _common(one, other) for other in tasks] for one in tasks]
    return found if any(r for i, row in enumerate(found) for j, r in enumerate(row) if i != j) else None


def _common(one: TaskScores, other: TaskScores) -> float:
    """Return the share of common documents: of n and m documents, c in common correlate the means by c / sqrt(n m)."""
    sizes = math.sqrt(len(one.scores["candidate"]) * len(other.scores["candidate"]))
    common = max(len(mine & theirs) for mine, theirs in zip(one.contents, other.contents, strict=True))
    return min(common / sizes, 1.0) if sizes else 0.0


def _share(task: TaskScores, system: str) -> float:
    """Return the mean score of a system, oriented: more is better."""
    scores = task.scores[system]
    mean = fmean(scores) if scores else 0.0
    return mean if task.higher_is_better else 1 - mean


def _decide_alone(comparison: Comparison, confidence: float, look: Look) -> Decision:
    nominal, evidence = look.nominal(confidence), comparison.evidence
    if evidence is None:
        return Decision(state="undecided", bounds=Bounds(0.0, 0.0), confidence=nominal)
    bounds = evidence.bounds(nominal)
    return Decision(
        state=_state(comparison, bounds, passed=bounds.low > comparison.threshold),
        bounds=bounds,
        confidence=nominal,
        hopeless=is_hopeless(evidence, comparison.threshold, look, confidence),
    )


def _decide_together(lifts: Sequence[Comparison], confidence: float, look: Look) -> list[Decision]:
    """Answer several lifts that share the allowed error."""
    alone = [_decide_alone(lift, confidence, look) for lift in lifts]
    lows = [_low_at(lift.evidence, look) for lift in lifts]
    claims = holm(lows, [lift.threshold for lift in lifts], confidence)
    return [
        replace(
            decision,
            state=_state(lift, decision.bounds, passed=claim.passed),
            family=len(lifts),
            adjusted_low=None if lift.evidence is None else claim.low,
        )
        for lift, decision, claim in zip(lifts, alone, claims, strict=True)
    ]


def _low_at(evidence: Evidence | None, look: Look) -> LowAt:
    """Return the lower bound as a function of the confidence of all looks together."""
    if evidence is None:
        return lambda confidence: -math.inf
    return lambda confidence: evidence.bounds(look.nominal(confidence)).low


def _state(comparison: Comparison, bounds: Bounds, *, passed: bool) -> VerdictState:
    if passed:
        return "pass"
    if comparison.evidence is None:
        return "undecided"
    threshold = comparison.threshold
    fails = bounds.high <= threshold if RULES[comparison.role].fails_at_least else bounds.high < threshold
    return "fail" if fails else "undecided"
