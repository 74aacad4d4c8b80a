"""The leaderboard: artifacts beside their bases, ranked by the scores of the ledger that can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from posttrain.ledger import Lift
from posttrain.report.scores import Scale


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line: an artifact with the lift over its base, or a base."""

    digest: str
    name: str
    """Recipe and stage of an artifact, name of a base."""
    lineage: str
    """``base`` for a base."""
    n: int
    score: float
    lift: float | None = None
    """Over the base, with bounds; None for a base, and for an artifact that was compared with its parent alone."""
    low: float | None = None
    high: float | None = None
    verdict: str = ""
    """Of the whole gate that judged the artifact."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """Scores of one task that can be compared, best first."""

    task: str
    metric: str
    higher_is_better: bool
    questions: str
    n: int
    entries: Sequence[Entry]

    @property
    def scale(self) -> Scale:
        """How its scores are written."""
        return Scale.of(*(entry.score for entry in self.entries))


def boards(lifts: Iterable[Lift]) -> list[Board]:
    """The boards of every task, by name; a task that was asked in several ways has one for each, the newest first."""
    groups: dict[tuple[str, str, str], list[Lift]] = {}
    for lift in lifts:
        key = (lift.task, lift.metric, lift.questions)
        groups[key] = [*groups.pop(key, []), lift]
    newest_first = list(reversed(groups.values()))
    return sorted((_board(group) for group in newest_first), key=lambda board: (board.task, board.metric))


def _board(group: Sequence[Lift]) -> Board:
    """The board of lifts about the same questions, in the order of recording."""
    last = group[-1]
    artifacts = {lift.artifact: _artifact(lift) for lift in group if lift.against != "base"}
    artifacts |= {lift.artifact: _over_base(lift) for lift in group if lift.against == "base"}
    bases = {lift.base: _base(lift) for lift in group}
    entries = sorted([*artifacts.values(), *bases.values()], key=lambda entry: entry.score)
    return Board(
        task=last.task,
        metric=last.metric,
        higher_is_better=last.higher_is_better,
        questions=last.questions,
        n=last.n,
        entries=entries[::-1] if last.higher_is_better else entries,
    )


def _artifact(lift: Lift) -> Entry:
    return Entry(
        digest=lift.artifact,
        name=f"{lift.recipe} {lift.stage}",
        lineage=lift.lineage,
        n=lift.n,
        score=lift.candidate_score,
        verdict=lift.verdict,
    )


def _over_base(lift: Lift) -> Entry:
    return replace(_artifact(lift), lift=lift.lift, low=lift.low, high=lift.high)


def _base(lift: Lift) -> Entry:
    return Entry(digest=lift.base, name=lift.base_model, lineage="base", n=lift.n, score=lift.base_score)
