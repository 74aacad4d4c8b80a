"""The leaderboard: artifacts and their bases, ranked by comparable scores of the ledger."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.ledger import Lift
from posttrain.report.scores import Scale

COLUMNS = ("artifact", "recipe", "lineage", "n", "score", "lift over base", "verdict")
OTHER = "Other documents or settings than in the board above; do not compare scores across the two."


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
    run: str = ""
    """Name of the run that judged the artifact last; empty for a base."""
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

    @functools.cached_property
    def scale(self) -> Scale:
        """The unit of its scores."""
        return Scale.of(*(entry.score for entry in self.entries))


def boards(lifts: Iterable[Lift]) -> list[Board]:
    """Return the boards by name of task; a task asked in several ways has a board for each, the newest first."""
    groups: dict[tuple[str, str, str], list[Lift]] = {}
    for lift in lifts:
        key = (lift.task, lift.metric, lift.questions)
        group = groups.pop(key, [])
        group.append(lift)
        groups[key] = group  # last again: the newest group is
    newest_first = list(reversed(groups.values()))
    return sorted((_board(group) for group in newest_first), key=lambda board: (board.task, board.metric))


def _board(group: Sequence[Lift]) -> Board:
    """Return the board of lifts about the same questions, given in the order of recording."""
    last = group[-1]
    # An artifact judged again has one entry, from its last verdict; one with the lift over the base where there is any.
    chosen = {lift.artifact: lift for lift in group if lift.against != "base"}
    chosen |= {lift.artifact: lift for lift in group if lift.against == "base"}
    verdicts = _verdicts(group)
    artifacts = [_artifact(lift, verdicts[digest]) for digest, lift in chosen.items()]
    bases = {lift.base: lift for lift in group}.values()
    return Board(
        task=last.task,
        metric=last.metric,
        higher_is_better=last.higher_is_better,
        questions=last.questions,
        n=last.n,
        entries=_rank([*artifacts, *map(_base, bases)], last.higher_is_better),
    )


def _rank(entries: Sequence[Entry], higher_is_better: bool) -> list[Entry]:
    """Sort the entries of a board: the best score first."""
    ranked = sorted(entries, key=lambda entry: entry.score)
    return ranked[::-1] if higher_is_better else ranked


def _artifact(lift: Lift, verdict: str) -> Entry:
    over_base = lift.against == "base"
    return Entry(
        digest=lift.artifact,
        name=f"{lift.recipe} {lift.stage}",
        lineage=lift.lineage,
        n=lift.n,
        score=lift.candidate_score,
        lift=lift.lift if over_base else None,
        low=lift.low if over_base else None,
        high=lift.high if over_base else None,
        run=lift.run,
        verdict=verdict,
    )


def _verdicts(group: Sequence[Lift]) -> dict[str, str]:
    """Return the last verdict of every gate about each artifact, each once: a lax gate hides no strict one."""
    last: dict[str, dict[tuple[str, str], str]] = {}
    for lift in group:
        last.setdefault(lift.artifact, {})[lift.run, lift.stage] = _verdict(lift)
    return {artifact: ", ".join(dict.fromkeys(found.values())) for artifact, found in last.items()}


def _verdict(lift: Lift) -> str:
    return f"{lift.verdict} on {lift.unpromoted}" if lift.unpromoted else lift.verdict


def _base(lift: Lift) -> Entry:
    return Entry(digest=lift.base, name=lift.base_model, lineage="base", n=lift.n, score=lift.base_score)


def title(board: Board) -> str:
    """Return the title of a board: task, metric, documents, direction."""
    better = "" if board.higher_is_better else ", less is better"
    return f"{board.task}: {board.metric}, {board.n:,} documents{better}"


def cells(entry: Entry, scale: Scale) -> tuple[str, ...]:
    """Return the cells of an entry in the order of COLUMNS."""
    lift = ""
    if entry.lift is not None and entry.low is not None and entry.high is not None:
        lift = scale.interval(entry.lift, entry.low, entry.high)
    score = scale.score(entry.score)
    name = "/".join(entry.name.split("/")[-2:])  # the end of a path tells it from others
    return (entry.digest[:8], name, entry.lineage, f"{entry.n:,}", score, lift, entry.verdict)
