"""Scores of all systems matched by document; a scorecard that could mislead is rejected here, before any statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.digests import digest_of
from posttrain.errors import ArtifactDamaged
from posttrain.gate.sequential import portion_size
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask

Rows = Mapping[int, DocumentScore]
"""One system's rows of one task under one filter, by document."""

Table = Mapping[tuple[str, str], Mapping[str, Rows]]
"""Rows by (task, system), then filter, then document."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The scores of one task, by system."""

    name: str
    task: GateTask
    filter: str
    higher_is_better: bool
    questions: str
    """SHA-256 over metric, filter and documents."""
    scores: Mapping[str, Sequence[float]]
    """By system, over the same documents in the same order."""
    clusters: Sequence[str] | None
    """The source of each document, where the gate asks for it."""

    @property
    def fractions(self) -> bool:
        """True when all scores lie between 0 and 1, as shares of right answers do."""
        return all(0 <= score <= 1 for scores in self.scores.values() for score in scores)


def match_scores(request: GateRequest, scorecard: Scorecard) -> list[TaskScores]:
    """Match the scores of every task of the gate.

    Raises ArtifactDamaged when a score is missing, doubled, not finite or of other weights, or when two systems were
    not asked the same.
    """
    table = _by_task(scorecard.rows)
    return [_match_task(request, scorecard, name, task, table) for name, task in request.tasks.items()]


def _match_task(request: GateRequest, scorecard: Scorecard, name: str, task: GateTask, table: Table) -> TaskScores:
    rows = {system: _rows(name, task, system, table.get((name, system), {})) for system in request.systems}
    candidate = rows["candidate"]
    for system, found in rows.items():
        _require_fresh(name, system, found, request.systems[system].digest)
        _require_same_questions(name, system, found, candidate)
    _require_all(name, len(candidate), scorecard)
    return TaskScores(
        name=name,
        task=task,
        filter=next((row.filter for row in candidate.values()), task.filter or ""),
        higher_is_better=_direction(name, task, scorecard),
        questions=_digest(task, candidate),
        scores={system: _scores(name, task.metric, found) for system, found in rows.items()},
        clusters=None if task.cluster is None else _clusters(name, candidate, scorecard),
    )


def _by_task(rows: Iterable[DocumentScore]) -> Table:
    table: dict[tuple[str, str], dict[str, dict[int, DocumentScore]]] = {}
    for row in rows:
        documents = table.setdefault((row.task, row.system), {}).setdefault(row.filter, {})
        if row.doc_id in documents:
            raise ArtifactDamaged(f"{row.system} has two scores for document {row.doc_id} of {row.task} ({row.filter})")
        documents[row.doc_id] = row
    return table


def _rows(name: str, task: GateTask, system: str, by_filter: Mapping[str, Rows]) -> Rows:
    if task.filter is not None:
        return by_filter.get(task.filter, {})
    if len(by_filter) > 1:
        raise ArtifactDamaged(f"{name} of {system} was scored under several filters: {', '.join(sorted(by_filter))}")
    return next(iter(by_filter.values()), {})


def _require_fresh(name: str, system: str, rows: Rows, digest: str) -> None:
    # A cached scorecard may outlive the weights that it was made from.
    stale = next((row for row in rows.values() if row.digest != digest), None)
    if stale is not None:
        raise ArtifactDamaged(
            f"{name}: the scores of {system} are those of {stale.digest[:12]}, not of {digest[:12]}: they are stale"
        )


def _require_same_questions(name: str, system: str, rows: Rows, candidate: Rows) -> None:
    # The tests are paired: one other prompt or few-shot example would be taken for a change of the model.
    missing = sorted(set(rows) ^ set(candidate))
    if missing:
        lacking = system if missing[0] in candidate else "candidate"
        raise ArtifactDamaged(f"{name}: {lacking} has no score for {len(missing)} documents, such as {missing[0]}")
    for doc_id, row in rows.items():
        other = candidate[doc_id]
        for what in ("filter", "document_hash", "request_hash", "target_hash"):
            if getattr(row, what) != getattr(other, what):
                raise ArtifactDamaged(f"{name}: {system} and candidate differ in the {what} of document {doc_id}")


def _require_all(name: str, found: int, scorecard: Scorecard) -> None:
    """Require all documents of the task or, in a sequential gate, the part that belongs to its look."""
    total = scorecard.documents.get(name)
    if total is None and not scorecard.look.last:
        raise ArtifactDamaged(f"{name}: the scorecard of an early look does not say how many documents there are")
    expected = found if total is None else portion_size(total, scorecard.look)
    if found != expected:
        raise ArtifactDamaged(f"{name}: {found:,} documents are scored, not {expected:,}")


def _scores(name: str, metric: str, rows: Rows) -> list[float]:
    scores = []
    for doc_id, row in sorted(rows.items()):
        score = row.metrics.get(metric)
        if score is None or not math.isfinite(score):
            raise ArtifactDamaged(f"{name}: {row.system} has no finite {metric} for document {doc_id}")
        scores.append(float(score))
    return scores


def _direction(name: str, task: GateTask, scorecard: Scorecard) -> bool:
    if name not in scorecard.higher_is_better:
        raise ArtifactDamaged(f"{name}: the scorecard does not say whether more is better")
    found = scorecard.higher_is_better[name]
    if task.higher_is_better not in (None, found):
        raise ArtifactDamaged(f"{name}: the gate says higher_is_better={task.higher_is_better}, the scorecard {found}")
    return found


def _clusters(name: str, rows: Rows, scorecard: Scorecard) -> list[str]:
    sources = scorecard.clusters.get(name, {})
    missing = next((doc_id for doc_id in sorted(rows) if doc_id not in sources), None)
    if missing is not None:
        raise ArtifactDamaged(f"{name}: the scorecard does not name the source of document {missing}")
    return [sources[doc_id] for doc_id in sorted(rows)]


def _digest(task: GateTask, rows: Rows) -> str:
    used = next((row.filter for row in rows.values()), task.filter or "")
    documents = [[row.doc_id, row.document_hash, row.target_hash] for _, row in sorted(rows.items())]
    return digest_of([task.metric, used, task.num_fewshot, task.chat, documents])
