"""The documents that a stage made worse or better, with the answers before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.gate.spec import DocumentScore, TaskVerdict

SHOWN = 5
"""Documents of a kind that are shown: those that changed most, in the order of the task."""
LONGEST = 2000
"""Characters of an answer that are shown."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One document, as the two systems of a comparison answered it."""

    before: DocumentScore
    after: DocumentScore
    metric: str
    gain: float
    """How much better the candidate's score is; negative when it is worse."""

    @property
    def scores(self) -> tuple[float, float]:
        """The score before and after."""
        return self.before.metrics[self.metric], self.after.metrics[self.metric]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What happened to the documents of one task between one system and the candidate."""

    task: TaskVerdict
    worse: Sequence[Change]
    """Most worsened first."""
    better: Sequence[Change]
    same: int

    @property
    def compared(self) -> int:
        """Documents that both systems answered."""
        return len(self.worse) + len(self.better) + self.same


def comparisons(tasks: Iterable[TaskVerdict], rows: Sequence[DocumentScore]) -> list[Comparison]:
    """The documents of every comparison of a verdict that the scorecard holds for both systems."""
    by_system: dict[tuple[str, str, str], dict[int, DocumentScore]] = {}
    for row in rows:
        by_system.setdefault((row.system, row.task, row.filter), {})[row.doc_id] = row
    return [
        _comparison(
            task,
            by_system.get((task.against, task.task, task.filter), {}),
            by_system.get(("candidate", task.task, task.filter), {}),
        )
        for task in tasks
    ]


def shortened(text: str) -> str:
    """A text as far as it is shown."""
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[:LONGEST]}… ({left_out:,} more characters)"


def _comparison(
    task: TaskVerdict, before: Mapping[int, DocumentScore], after: Mapping[int, DocumentScore]
) -> Comparison:
    changes = [
        _change(task, before[doc_id], after[doc_id])
        for doc_id in sorted(before.keys() & after.keys())
        if task.metric in before[doc_id].metrics and task.metric in after[doc_id].metrics
    ]
    return Comparison(
        task=task,
        worse=sorted((change for change in changes if change.gain < 0), key=lambda change: change.gain),
        better=sorted((change for change in changes if change.gain > 0), key=lambda change: -change.gain),
        same=sum(change.gain == 0 for change in changes),
    )


def _change(task: TaskVerdict, before: DocumentScore, after: DocumentScore) -> Change:
    difference = after.metrics[task.metric] - before.metrics[task.metric]
    gain = difference if task.higher_is_better else -difference
    return Change(before=before, after=after, metric=task.metric, gain=gain)
