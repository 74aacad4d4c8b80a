"""Slices of a comparison: the documents of each value of a field, to say where a loss or a lift comes from.

Whoever looks at many slices finds one that got worse by chance. All bounds of one comparison therefore hold together:
each takes its part of the allowed error, the same for every slice (Bonferroni). Slices explain a verdict, and decide
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.gate.evidence import Evidence, measure_distance, pair_scores
from posttrain.gate.spec import SliceVerdict

if TYPE_CHECKING:
    from posttrain.gate.matching import TaskScores
    from posttrain.gate.spec import TaskVerdict


@dataclass(frozen=True)
class Part:
    """The evidence in the documents of one slice."""

    field: str
    value: str
    evidence: Evidence
    better: int
    """Documents that the candidate answers better: than the other system, or than a limit asks for."""
    worse: int


def cut(task: TaskScores, better: Sequence[float], worse: Sequence[float]) -> tuple[Part, ...]:
    """Return the parts of a paired comparison: lifts are ``better`` less ``worse``, document by document."""
    changes = [one - other for one, other in zip(better, worse, strict=True)]

    def evidence(chosen: Sequence[int], clusters: Sequence[str] | None) -> Evidence:
        return pair_scores([better[place] for place in chosen], [worse[place] for place in chosen], clusters)

    return _parts(task, changes, evidence)


def cut_limit(task: TaskScores, scores: Sequence[float], limit: float) -> tuple[Part, ...]:
    """Return the parts of a limit: lifts are the distances of the candidate's own scores from its good side."""
    sign = 1 if task.higher_is_better else -1

    def evidence(chosen: Sequence[int], clusters: Sequence[str] | None) -> Evidence:
        own = [scores[place] for place in chosen]
        return measure_distance(own, limit, higher_is_better=task.higher_is_better, clusters=clusters)

    return _parts(task, [sign * (score - limit) for score in scores], evidence)


def _parts(
    task: TaskScores,
    changes: Sequence[float],
    evidence: Callable[[Sequence[int], Sequence[str] | None], Evidence],
) -> tuple[Part, ...]:
    """Return the part of every value of every field, with the evidence in the places of its documents."""
    parts = []
    for field, values in task.slices.items():
        places: dict[str, list[int]] = {}
        for place, value in enumerate(values):
            places.setdefault(value, []).append(place)
        for value, chosen in sorted(places.items()):
            clusters = None if task.clusters is None else [task.clusters[place] for place in chosen]
            gained, lost = (sum(sign * changes[place] > 0 for place in chosen) for sign in (1, -1))
            parts.append(Part(field, value, evidence(chosen, clusters), gained, lost))
    return tuple(parts)


def bound_parts(parts: Sequence[Part], confidence: float) -> tuple[SliceVerdict, ...]:
    """Return every part with bounds that hold for all of them together at the one-sided ``confidence``."""
    return tuple(_bounded(part, 1 - (1 - confidence) / len(parts)) for part in parts)


def _bounded(part: Part, confidence: float) -> SliceVerdict:
    bounds = part.evidence.bounds(confidence)
    return SliceVerdict(
        field=part.field, value=part.value, n=part.evidence.n, better=part.better, worse=part.worse,
        lift=part.evidence.mean, low=bounds.low, high=bounds.high,
    )  # fmt: skip


def drivers(verdict: TaskVerdict) -> Iterator[str]:
    """Yield a sentence for each slice that a loss or a lift comes from.

    That is the one with most of the changed answers of its field, where its bounds tell its change from none; or where
    the comparison is no pass: then a loss is to be explained even if it may be chance.
    """
    for field in dict.fromkeys(part.field for part in verdict.slices):
        parts = [part for part in verdict.slices if part.field == field]
        if len(parts) < 2:
            continue
        lost, won = max(parts, key=lambda part: part.worse), max(parts, key=lambda part: part.better)
        if lost.worse and (lost.high < 0 or verdict.state != "pass"):
            yield _sentence(verdict, lost, lost.worse, sum(part.worse for part in parts), "lost", chance=lost.high >= 0)
        if won.better and won.low > 0 and verdict.role != "limit":  # an answer beyond a limit is no gain
            yield _sentence(verdict, won, won.better, sum(part.better for part in parts), "won", chance=False)


def _sentence(verdict: TaskVerdict, part: SliceVerdict, count: int, total: int, kind: str, *, chance: bool) -> str:
    shares = all(0 <= score <= 1 for score in (verdict.base, verdict.parent, verdict.candidate))
    lift, low, high = (_change(value, shares) for value in (part.lift, part.low, part.high))
    doubt = ", which may be chance" if chance else ""
    figures = f"{lift} [{low}, {high}] at n = {part.n:,}, corrected for {len(verdict.slices)} slices{doubt}"
    where = f"{verdict.task} against {verdict.against}"
    answers = "answers worse than the limit" if verdict.role == "limit" else f"{kind} answers"
    return f"{where}: {count:,} of {total:,} {answers} are in {part.field} {part.value} ({figures})"


def _change(value: float, shares: bool) -> str:
    return (f"{100 * value:+.1f}" if shares else f"{value:+.4g}").replace("-", "−")
