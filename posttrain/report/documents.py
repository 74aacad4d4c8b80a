"""The documents that a stage made worse or better, with the answers before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.gate.spec import DocumentScore, TaskVerdict

MOST_DOCUMENTS = 5
"""Documents shown per direction, worse and better: the largest changes."""
MOST_CHARACTERS = 2000
"""Characters shown of an answer."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One document, as the two systems of a comparison answered it."""

    before: DocumentScore
    after: DocumentScore
    metric: str
    gain: float
    """Improvement of the score; negative when the candidate's is worse."""

    @property
    def scores(self) -> tuple[float, float]:
        """The score before and after."""
        return self.before.metrics[self.metric], self.after.metrics[self.metric]


@dataclass(frozen=True, kw_only=True)
class TaskChanges:
    """The documents of one task, compared between one system and the candidate."""

    task: TaskVerdict
    worse: Sequence[Change]
    """The largest loss first; equal losses in the order of the task."""
    better: Sequence[Change]
    """The largest gain first; equal gains in the order of the task."""
    same: int

    @property
    def compared(self) -> int:
        """Documents answered by both systems."""
        return len(self.worse) + len(self.better) + self.same


def changed_documents(tasks: Iterable[TaskVerdict], rows: Sequence[DocumentScore]) -> list[TaskChanges]:
    """Return the changes of every comparison in a verdict, for the documents scored for both systems."""
    by_system: dict[tuple[str, str, str], dict[int, DocumentScore]] = {}
    for row in rows:
        by_system.setdefault((row.system, row.task, row.filter), {})[row.doc_id] = row
    return [
        _task_changes(
            task,
            by_system.get((task.against, task.task, task.filter), {}),
            by_system.get(("candidate", task.task, task.filter), {}),
        )
        for task in tasks
    ]


def shorten(text: str) -> str:
    """Cut a text after MOST_CHARACTERS, and say how much is missing."""
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]}… ({left_out:,} more characters)"


def _task_changes(
    task: TaskVerdict, before: Mapping[int, DocumentScore], after: Mapping[int, DocumentScore]
) -> TaskChanges:
    changes = [
        _change(task, before[doc_id], after[doc_id])
        for doc_id in sorted(before.keys() & after.keys())
        if task.metric in before[doc_id].metrics and task.metric in after[doc_id].metrics
    ]
    return TaskChanges(
        task=task,
        worse=sorted((change for change in changes if change.gain < 0), key=lambda change: change.gain),
        better=sorted((change for change in changes if change.gain > 0), key=lambda change: -change.gain),
        same=sum(change.gain == 0 for change in changes),
    )


def _change(task: TaskVerdict, before: DocumentScore, after: DocumentScore) -> Change:
    difference = after.metrics[task.metric] - before.metrics[task.metric]
    gain = difference if task.higher_is_better else -difference
    return Change(before=before, after=after, metric=task.metric, gain=gain)
