"""Rows of a preparation as pages show them: by source, and step by step from read to kept, in rows and in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from posttrain.prepare.ledger import CONTAMINATION, EXACT, NEAR, SEMANTIC, UNREADABLE, Summary, Waterfall, in_order

MUCH = 0.01
"""Share of rows with a finding from which on there is advice about it."""
MUCH_TOUCHED = 0.02
"""Share of a task's documents in the data from which on its score says little (as in arXiv:2411.15124)."""
MUCH_DROPPED = 0.2
"""Share of rows left out by one rule from which on there is advice to look at them."""


@dataclass(frozen=True, kw_only=True)
class Fall:
    """One step of the waterfall: the rows that a rule leaves out."""

    rule: str
    rows: int
    tokens: str
    """About as many tokens, or an empty text where none were measured."""
    left: int
    """Rows that are left after it."""
    percent: float
    """Those, in percent of the rows read."""


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """Rows of one source, or of all."""

    source: str
    read: int
    kept: int
    read_tokens: str
    kept_tokens: str
    trained: str
    """Share of the characters that stay that is an answer, which is what the loss is taken on."""
    falls: Sequence[Fall]


def sources(summary: Summary) -> list[SourceRows]:
    """Return every source of a preparation; with several, all together come first."""
    rates = summary.tokens_per_character
    found = [
        _source(each, [each], [rate]) for each, rate in zip_longest(summary.sources, rates[: len(summary.sources)])
    ]
    if len(found) < 2:
        return found
    total = Waterfall(source="all sources", read=0, kept=0, dropped={})
    for each in summary.sources:
        total.add(each)
    return [_source(total, summary.sources, rates), *found]


def _source(total: Waterfall, parts: Sequence[Waterfall], rates: Sequence[float | None]) -> SourceRows:
    def tokens(counts: Sequence[int]) -> str:
        known = [rate is not None or not count for count, rate in zip_longest(counts, rates)]
        return f"{sum(count * (rate or 0) for count, rate in zip_longest(counts, rates)):,.0f}" if all(known) else ""

    falls, left = [], total.read
    for rule, count in in_order(total.dropped).items():
        left -= count
        lost = tokens([part.dropped_characters.get(rule, 0) for part in parts]) if rule != UNREADABLE else ""
        falls.append(Fall(rule=rule, rows=count, tokens=lost, left=left, percent=_percent(left, total.read)))
    share = total.kept_answers / total.kept_characters if total.kept_characters else None
    return SourceRows(
        source=total.source, read=total.read, kept=total.kept, falls=falls,
        read_tokens=tokens([part.characters for part in parts]),
        kept_tokens=tokens([part.kept_characters for part in parts]),
        trained="" if share is None else f"{share:.0%}",
    )  # fmt: skip


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0


def advice(summary: Summary) -> list[str]:
    """Return what to look at: rules that find much and leave it in or out, and tasks that the data holds."""
    lines = []
    for rule, count in summary.found.items():
        stays = count - summary.dropped.get(rule, 0)
        if rule not in (EXACT, NEAR, SEMANTIC, CONTAMINATION) and stays > MUCH * summary.read:
            lines.append(
                f"{stays:,} rows with the finding {rule} are trained ({stays / summary.read:.1%}): look at them;"
                f" prepare.rules.{rule}=drop leaves them out"
            )
    for rule, count in summary.dropped.items():
        if rule in summary.found and count > MUCH_DROPPED * summary.read and rule != NEAR:
            lines.append(f"{rule} leaves out {count / summary.read:.0%} of the rows: look at them before you train")
    for task, counts in summary.tasks.items():
        if counts.touched > MUCH_TOUCHED * counts.documents:
            lines.append(
                f"{counts.touched / counts.documents:.1%} of the documents of {task} are in the data as it was read:"
                " models that were trained on it elsewhere know them; name the share beside the score"
            )
    return lines + _uneven(summary)


def _uneven(summary: Summary) -> list[str]:
    """Return a line about a source that hardly anything is left of."""
    return [
        f"{each.source} keeps {each.kept:,} of {each.read:,} rows: {_main(each.dropped)} takes most of them"
        for each in summary.sources
        if len(summary.sources) > 1 and each.kept < each.read / 2
    ]


def _main(dropped: Mapping[str, int]) -> str:
    return max(dropped, key=lambda rule: dropped[rule])
