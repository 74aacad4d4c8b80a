"""Scores of all systems matched by document; a scorecard that could mislead is rejected here, before any statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from posttrain.digests import digest_of
from posttrain.errors import ArtifactDamaged
from posttrain.gate.halves import select_half
from posttrain.gate.sequential import select_portion
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask, Half

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
    """By system, over the same documents in the same order. Equal documents are one, with the mean of their scores."""
    clusters: Sequence[str] | None
    """The source of each document, where the gate asks for it or documents resemble each other."""
    documents: int
    """Number of scored documents, equal ones included."""
    slices: Mapping[str, Sequence[str]]
    """The value of each document by field; of equal documents, that of the first."""
    contents: tuple[frozenset[str], frozenset[str]]
    """Hashes of the documents, and of their requests."""

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
    _require_all(name, len(candidate), scorecard, request.gate.seed)
    _require_half(name, candidate, scorecard, request.gate.half)
    groups = group_equal({doc_id: (row.document_hash, row.request_hash) for doc_id, row in candidate.items()})
    return TaskScores(
        name=name,
        task=task,
        filter=next((row.filter for row in candidate.values()), task.filter or ""),
        higher_is_better=_direction(name, task, scorecard),
        questions=_digest(task, candidate),
        scores={system: _scores(name, task.metric, found, groups) for system, found in rows.items()},
        clusters=_clusters(name, task, groups, scorecard),
        documents=len(candidate),
        slices=_slices(name, groups, scorecard),
        contents=(
            frozenset(row.document_hash for row in candidate.values()),
            frozenset(row.request_hash for row in candidate.values()),
        ),
    )


def group_equal(keys: Mapping[int, Iterable[str]]) -> list[list[int]]:
    """Return the documents in groups of equal ones: any key in common makes two equal, and so does a third between.

    Groups and documents are in the order of the documents.
    """
    leader: dict[int, int] = {}
    first: dict[str, int] = {}

    def find(document: int) -> int:
        while leader[document] != document:
            leader[document] = document = leader[leader[document]]
        return document

    for document in sorted(keys):
        leader[document] = document
        for place, key in enumerate(keys[document]):
            if not key:  # a plugin need not know it
                continue
            other = find(first.setdefault(f"{place} {key}", document))
            own = find(document)
            leader[max(own, other)] = min(own, other)
    groups: dict[int, list[int]] = {}
    for document in sorted(keys):
        groups.setdefault(find(document), []).append(document)
    return list(groups.values())


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


def _require_all(name: str, found: int, scorecard: Scorecard, seed: int) -> None:
    """Require all documents of the task or, in a sequential gate, the part that belongs to its look."""
    total = scorecard.documents.get(name)
    if total is None and not scorecard.look.last:
        raise ArtifactDamaged(f"{name}: the scorecard of an early look does not say how many documents there are")
    clusters = scorecard.clusters.get(name)
    asked = range(total or found) if clusters is None else list(clusters)
    if total is not None and len(asked) != total:
        raise ArtifactDamaged(f"{name}: the scorecard names the source of {len(asked):,} documents, not of {total:,}")
    expected = found if total is None else len(select_portion(asked, scorecard.look, seed, clusters))
    if found != expected:
        raise ArtifactDamaged(f"{name}: {found:,} documents are scored, not {expected:,}")


def _require_half(name: str, rows: Rows, scorecard: Scorecard, half: Half) -> None:
    # A document that took part in the choice would judge what was chosen by it.
    hashes = {doc_id: row.document_hash for doc_id, row in rows.items()}
    if strange := sorted(hashes.keys() - select_half(hashes, half, scorecard.clusters.get(name))):
        others = f"{len(strange):,} documents, such as {strange[0]}"
        raise ArtifactDamaged(f"{name}: the gate asks the {half.value} half, and {others}, belong to the other")


def _scores(name: str, metric: str, rows: Rows, groups: Sequence[Sequence[int]]) -> list[float]:
    scores = {}
    for doc_id, row in rows.items():
        score = row.metrics.get(metric)
        if score is None or not math.isfinite(score):
            raise ArtifactDamaged(f"{name}: {row.system} has no finite {metric} for document {doc_id}")
        scores[doc_id] = float(score)
    return [fmean(scores[doc_id] for doc_id in group) if len(group) > 1 else scores[group[0]] for group in groups]


def _direction(name: str, task: GateTask, scorecard: Scorecard) -> bool:
    if name not in scorecard.higher_is_better:
        raise ArtifactDamaged(f"{name}: the scorecard does not say whether more is better")
    found = scorecard.higher_is_better[name]
    if task.higher_is_better not in (None, found):
        raise ArtifactDamaged(f"{name}: the gate says higher_is_better={task.higher_is_better}, the scorecard {found}")
    return found


def _clusters(name: str, task: GateTask, groups: Sequence[Sequence[int]], scorecard: Scorecard) -> list[str] | None:
    """Return the source of each group of equal documents; sources with equal documents are one."""
    sources = scorecard.clusters.get(name)
    if sources is None and task.cluster is None:
        return None
    missing = next((doc_id for group in groups for doc_id in group if doc_id not in (sources or {})), None)
    if sources is None or missing is not None:
        raise ArtifactDamaged(f"{name}: the scorecard does not name the source of document {missing}")
    return merge_sources(groups, sources)


def _slices(name: str, groups: Sequence[Sequence[int]], scorecard: Scorecard) -> dict[str, list[str]]:
    """Return the value of each group of equal documents, by field."""
    found = {}
    for field, documents in scorecard.slices.get(name, {}).items():
        values = {doc_id: value for value, ids in documents.items() for doc_id in ids}
        if missing := [group[0] for group in groups if group[0] not in values]:
            raise ArtifactDamaged(f"{name}: the scorecard does not name the {field} of document {missing[0]}")
        found[field] = [values[group[0]] for group in groups]
    return found


def merge_sources(groups: Sequence[Sequence[int]], sources: Mapping[int, str]) -> list[str]:
    """Return the source of each group of documents, where groups join the sources of their members."""
    first: dict[str, str] = {}

    def find(source: str) -> str:
        while first.setdefault(source, source) != source:
            source = first[source]
        return source

    for group in groups:
        for document in group[1:]:
            first[find(sources[document])] = find(sources[group[0]])
    return [find(sources[group[0]]) for group in groups]


def _digest(task: GateTask, rows: Rows) -> str:
    used = next((row.filter for row in rows.values()), task.filter or "")
    documents = [[row.doc_id, row.document_hash, row.target_hash] for _, row in sorted(rows.items())]
    return digest_of([task.metric, used, task.num_fewshot, task.chat, documents])
