"""The leaderboard: artifacts and their bases, ranked by comparable scores of the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from posttrain.ledger import Lift
from posttrain.report.scores import Scale


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line: an artifact with its lift over the base, or a base."""

    digest: str
    name: str
    """Recipe and stage of an artifact, name of a base."""
    lineage: str
    """``base`` for a base."""
    n: int
    score: float
    lift: float | None = None
    """Lift over the base; None for a base, and for an artifact never compared with its base."""
    low: float | None = None
    high: float | None = None
    verdict: str = ""
    """Last verdict of every gate about the artifact, each once; empty for a base."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """Comparable scores of one task, the best first."""

    task: str
    metric: str
    higher_is_better: bool
    questions: str
    """Equal for comparable scores; see TaskVerdict."""
    n: int
    entries: Sequence[Entry]

    @property
    def scale(self) -> Scale:
        """The unit of its scores."""
        return Scale.of(*(entry.score for entry in self.entries))


def boards(lifts: Iterable[Lift]) -> list[Board]:
    """Return the boards by name of task; a task asked in several ways has a board for each, the newest first."""
    groups: dict[tuple[str, str, str], list[Lift]] = {}
    for lift in lifts:
        key = (lift.task, lift.metric, lift.questions)
        groups[key] = [*groups.pop(key, []), lift]
    newest_first = list(reversed(groups.values()))
    return sorted((_board(group) for group in newest_first), key=lambda board: (board.task, board.metric))


def _board(group: Sequence[Lift]) -> Board:
    """Return the board of lifts about the same questions, given in the order of recording."""
    last = group[-1]
    # An artifact judged again has one entry, from its last verdict; one with the lift over the base where there is any.
    artifacts = {lift.artifact: _artifact(lift) for lift in group if lift.against != "base"}
    artifacts |= {lift.artifact: _over_base(lift) for lift in group if lift.against == "base"}
    artifacts = {digest: replace(entry, verdict=_verdicts(group, digest)) for digest, entry in artifacts.items()}
    bases = {lift.base: _base(lift) for lift in group}
    return Board(
        task=last.task,
        metric=last.metric,
        higher_is_better=last.higher_is_better,
        questions=last.questions,
        n=last.n,
        entries=_rank([*artifacts.values(), *bases.values()], last.higher_is_better),
    )


def _rank(entries: Sequence[Entry], higher_is_better: bool) -> list[Entry]:
    """Sort the entries of a board: the best score first."""
    ranked = sorted(entries, key=lambda entry: entry.score)
    return ranked[::-1] if higher_is_better else ranked


def _artifact(lift: Lift) -> Entry:
    return Entry(
        digest=lift.artifact,
        name=f"{lift.recipe} {lift.stage}",
        lineage=lift.lineage,
        n=lift.n,
        score=lift.candidate_score,
    )


def _verdicts(group: Sequence[Lift], artifact: str) -> str:
    """Return the last verdict of every gate about an artifact, each once: a lax gate hides no strict one."""
    last = {(lift.run, lift.stage): _verdict(lift) for lift in group if lift.artifact == artifact}
    return ", ".join(dict.fromkeys(last.values()))


def _verdict(lift: Lift) -> str:
    return f"{lift.verdict} on {lift.unpromoted}" if lift.unpromoted else lift.verdict


def _over_base(lift: Lift) -> Entry:
    return replace(_artifact(lift), lift=lift.lift, low=lift.low, high=lift.high)


def _base(lift: Lift) -> Entry:
    return Entry(digest=lift.base, name=lift.base_model, lineage="base", n=lift.n, score=lift.base_score)
