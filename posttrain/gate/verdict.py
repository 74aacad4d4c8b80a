"""From scores to a verdict: pure, without torch, without files.

A lift passes when the lower bound of the paired difference exceeds ``min_lift``; a guard passes when that bound
exceeds ``-max_drop``. What the sample cannot tell is undecided, and so is a gate that asks nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from posttrain.artifact import digest_of
from posttrain.config.schema import Role
from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import Comparator, DocumentScore, GateRequest, Scorecard, State, TaskVerdict, Verdict
from posttrain.gate.statistics import Bounds, documents_needed, paired_bounds

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask

Rows = Mapping[int, DocumentScore]
"""One system's rows of one task under one filter, by document."""

Table = Mapping[tuple[str, str], Mapping[str, Rows]]
"""Rows by (task, system), then filter, then document."""


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """What the paired scores of one task say, oriented so that more is better."""

    role: Role
    differences: Sequence[float]
    bounds: Bounds
    threshold: float
    """What the lower bound has to exceed."""
    confidence: float
    fractions: bool
    """Whether the scores lie between 0 and 1, so that changes are shown in percentage points."""

    @classmethod
    def of(cls, new: Sequence[float], old: Sequence[float], task: GateTask, confidence: float) -> _Evidence:
        """The evidence in two systems' scores of the same documents."""
        return cls(
            role=task.role,
            differences=[after - before for after, before in zip(new, old, strict=True)],
            bounds=paired_bounds(new, old, confidence) if new else Bounds(0.0, 0.0),
            threshold=task.min_lift if task.role is Role.lift else -task.max_drop,
            confidence=confidence,
            fractions=all(0 <= score <= 1 for score in (*new, *old)),
        )

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def lift(self) -> float:
        return fmean(self.differences) if self.differences else 0.0

    @property
    def unit(self) -> str:
        return " points" if self.fractions else ""

    def show(self, value: float) -> str:
        """A change with its sign, in percentage points where scores are fractions."""
        text = f"{100 * value:+.2f}" if self.fractions else f"{value:+.4g}"
        return "0" if float(text) == 0 else text.replace("-", "−")


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One task as every system was asked it."""

    name: str
    task: GateTask
    filter: str
    higher_is_better: bool
    questions: str

    @classmethod
    def of(cls, name: str, task: GateTask, rows: Rows, higher_is_better: bool) -> _Asked:
        """The task that ``rows``, of any of the systems, answer."""
        used = next((row.filter for row in rows.values()), task.filter or "")
        documents = [[row.doc_id, row.document_hash, row.target_hash] for _, row in sorted(rows.items())]
        setting = [task.metric, used, task.num_fewshot, task.chat, documents]
        return cls(name=name, task=task, filter=used, higher_is_better=higher_is_better, questions=digest_of(setting))


def judge(request: GateRequest, scorecard: Scorecard) -> Verdict:
    """What the gate says about the candidate.

    Raises ArtifactDamaged when a score is missing, doubled or not finite, or when two systems were not asked the same.
    """
    if not request.gate.enabled:
        return Verdict(state="pass", gated=False, tasks=(), reason="the recipe switched this gate off")
    comparators = _comparators(request)
    if not request.tasks or not comparators:
        return Verdict(state="undecided", gated=True, tasks=(), reason="this gate asks nothing, so nothing can pass it")
    table = _by_task(scorecard.rows)
    verdicts: list[TaskVerdict] = []
    for name, task in request.tasks.items():
        higher_is_better = _direction(name, scorecard)
        scores, candidate = _matched_scores(request, name, task, table)
        asked = _Asked.of(name, task, candidate, higher_is_better)
        verdicts += [_compare(asked, against, scores, request.gate.confidence) for against in comparators]
    return Verdict(state=_overall(verdicts), gated=True, tasks=tuple(verdicts), reason=_summary(verdicts))


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as JSON values, as verdict.json holds it."""
    return {
        "state": verdict.state,
        "gated": verdict.gated,
        "reason": verdict.reason,
        "tasks": [asdict(task) for task in verdict.tasks],
    }


def read_verdict(path: Path) -> Verdict:
    """The verdict in a verdict.json; raises ArtifactDamaged when the file does not hold one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        tasks = tuple(TaskVerdict(**task) for task in record["tasks"])
        numbers = [value for task in tasks for value in asdict(task).values() if isinstance(value, float | int)]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("a figure is not finite")
        return Verdict(state=record["state"], gated=record["gated"], tasks=tasks, reason=record["reason"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactDamaged(f"{path} does not hold a verdict: {error}") from None


def _comparators(request: GateRequest) -> list[Comparator]:
    """What the candidate is compared with: a parent that is the base is compared with once, as the base."""
    wanted: list[Comparator] = []
    for name in request.gate.against:
        comparator: Comparator = "parent" if name == "parent" and "parent" in request.systems else "base"
        if comparator not in wanted:
            wanted.append(comparator)
    return wanted


def _by_task(rows: Iterable[DocumentScore]) -> Table:
    table: dict[tuple[str, str], dict[str, dict[int, DocumentScore]]] = {}
    for row in rows:
        documents = table.setdefault((row.task, row.system), {}).setdefault(row.filter, {})
        if row.doc_id in documents:
            raise ArtifactDamaged(f"{row.system} has two scores for document {row.doc_id} of {row.task} ({row.filter})")
        documents[row.doc_id] = row
    return table


def _direction(name: str, scorecard: Scorecard) -> bool:
    if name not in scorecard.higher_is_better:
        raise ArtifactDamaged(f"{name}: the scorecard does not say whether more is better")
    return scorecard.higher_is_better[name]


def _matched_scores(
    request: GateRequest, name: str, task: GateTask, table: Table
) -> tuple[dict[str, list[float]], Rows]:
    """Each system's scores of one task, document by document in the same order; and the candidate's rows."""
    rows = {system: _rows(name, task, system, table.get((name, system), {})) for system in request.systems}
    for system, found in rows.items():
        _require_same_questions(name, system, found, rows["candidate"])
    return {system: _scores(name, task.metric, found) for system, found in rows.items()}, rows["candidate"]


def _rows(name: str, task: GateTask, system: str, by_filter: Mapping[str, Rows]) -> Rows:
    if task.filter is not None:
        return by_filter.get(task.filter, {})
    if len(by_filter) > 1:
        raise ArtifactDamaged(f"{name} of {system} was scored under several filters: {', '.join(sorted(by_filter))}")
    return next(iter(by_filter.values()), {})


def _require_same_questions(name: str, system: str, rows: Rows, candidate: Rows) -> None:
    missing = sorted(set(rows) ^ set(candidate))
    if missing:
        lacking = system if missing[0] in candidate else "candidate"
        raise ArtifactDamaged(f"{name}: {lacking} has no score for {len(missing)} documents, such as {missing[0]}")
    for doc_id, row in rows.items():
        other = candidate[doc_id]
        for what in ("filter", "document_hash", "request_hash", "target_hash"):
            if getattr(row, what) != getattr(other, what):
                raise ArtifactDamaged(f"{name}: {system} and candidate differ in the {what} of document {doc_id}")


def _scores(name: str, metric: str, rows: Rows) -> list[float]:
    scores = []
    for doc_id, row in sorted(rows.items()):
        score = row.metrics.get(metric)
        if score is None or not math.isfinite(score):
            raise ArtifactDamaged(f"{name}: {row.system} has no finite {metric} for document {doc_id}")
        scores.append(float(score))
    return scores


def _compare(
    asked: _Asked, against: Comparator, scores: Mapping[str, Sequence[float]], confidence: float
) -> TaskVerdict:
    new, old = scores["candidate"], scores[against]
    # Exchanging the systems turns a metric around: less is better becomes more is better.
    better, worse = (new, old) if asked.higher_is_better else (old, new)
    evidence = _Evidence.of(better, worse, asked.task, confidence)
    state = _state(evidence)
    means = {system: fmean(found) if found else 0.0 for system, found in scores.items()}
    return TaskVerdict(
        task=asked.name,
        metric=asked.task.metric,
        filter=asked.filter,
        higher_is_better=asked.higher_is_better,
        questions=asked.questions,
        role=asked.task.role.value,
        against=against,
        n=evidence.n,
        base=means["base"],
        parent=means.get("parent", means["base"]),
        candidate=means["candidate"],
        lift=evidence.lift,
        low=evidence.bounds.low,
        high=evidence.bounds.high,
        confidence=confidence,
        threshold=evidence.threshold,
        state=state,
        reason=_reason(state, evidence),
    )


def _state(evidence: _Evidence) -> State:
    bounds, threshold = evidence.bounds, evidence.threshold
    if evidence.n == 0:
        return "undecided"
    if bounds.low > threshold:
        return "pass"
    refused = bounds.high <= threshold if evidence.role is Role.lift else bounds.high < threshold
    return "fail" if refused else "undecided"


def _overall(verdicts: Sequence[TaskVerdict]) -> State:
    states = {verdict.state for verdict in verdicts}
    return "fail" if "fail" in states else "undecided" if "undecided" in states else "pass"


def _summary(verdicts: Sequence[TaskVerdict]) -> str:
    state = _overall(verdicts)
    if state == "pass":
        return "every task passed"
    deciding = [verdict for verdict in verdicts if verdict.state == state]
    return "; ".join(f"{verdict.task} against {verdict.against}: {verdict.reason}" for verdict in deciding)


def _reason(state: State, evidence: _Evidence) -> str:
    n = evidence.n
    if n == 0:
        return "there are no documents"
    show = evidence.show
    change = f"{'lift' if evidence.role is Role.lift else 'change'} {show(evidence.lift)}{evidence.unit}"
    low, high, threshold = show(evidence.bounds.low), show(evidence.bounds.high), show(evidence.threshold)
    if state == "pass":
        return f"{change}, and its lower bound {low} exceeds {threshold} (n = {n})"
    if state == "fail":
        limit = "does not exceed" if evidence.role is Role.lift else "lies below"
        return f"{change}, and even its upper bound {high} {limit} {threshold} (n = {n})"
    doubt = "no change" if evidence.threshold == 0 else f"a change of {threshold}{evidence.unit}"
    told = f"{change}, but its lower bound {low} does not exceed {threshold}"
    return f"{told}: at n = {n} that cannot be told from {doubt}; {_advice(evidence)}"


def _advice(evidence: _Evidence) -> str:
    """How many documents could decide, or that more would not help."""
    needed = documents_needed(evidence.differences, evidence.threshold, evidence.confidence)
    if needed is None:
        return "if the change is what it seems, more documents would refuse it"
    # Three digits: the number rests on the observed change, which is itself uncertain.
    step = 10 ** max(len(str(needed)) - 3, 0)
    return f"about {math.ceil(max(needed, evidence.n + 1) / step) * step:,} documents would do"
