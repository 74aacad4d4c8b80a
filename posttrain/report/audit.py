"""The audit of a preparation as one self-contained HTML page: what was left out, and why, with the rows themselves."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.preparation import Compared
from posttrain.data.records import Record
from posttrain.prepare.kept import Kept
from posttrain.prepare.languages import is_installed, language_of
from posttrain.prepare.ledger import CONTAMINATION, EXACT, KEPT, NEAR, SEMANTIC, Summary
from posttrain.prepare.rows import Row
from posttrain.report.page import environment
from posttrain.report.rows import advice, sources

MOST_ROWS = 4
"""Rows shown of the worst and of the borderline ones of a rule."""
MOST_WORDS = 250
"""Words compared of two rows."""
MOST_JUDGED = 500
"""Rows of which the language is detected."""
TOO_SHORT = "too short to tell"
AROUND = 300
"""Characters shown before and after the evidence."""
SPACED = re.compile(r"\s*\S+\s*")

Parts = list[tuple[str, bool]]
"""Pieces of a text, the marked ones with True."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row with a finding, beside the row that stays in its place if there is one."""

    where: str
    action: str
    score: float | None
    text: Parts
    beside: str = ""
    """Place of the row that stays, or name of the gate's document."""
    other: Parts | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """Findings of one rule."""

    rule: str
    found: int
    dropped: int
    worst: Sequence[Example]
    borderline: Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a histogram."""

    label: str
    count: int
    percent: float
    """Length in percent of the longest."""
    marked: bool = False


def audit_page(
    title: str, done: Kept, summary: Summary, records: Sequence[Record], threshold: float, lines: Sequence[str]
) -> str:
    """Render the audit of a stage's preparation.

    Args:
        title: The recipe and the stage.
        done: The preparation.
        summary: Its counts, with the lengths measured by the recipe's tokenizer.
        records: All rows as they were read, those of ``data`` first.
        threshold: Similarity from which on rows are near duplicates.
        lines: Lines of the display about the preparation.
    """
    kept, found = _ledger(done)
    return (
        environment()
        .get_template("audit.html")
        .render(
            title=title,
            summary=summary,
            sources=sources(summary),
            sections=_sections(found, records, summary.found, summary.dropped),
            lengths=_lengths(records, kept),
            languages=_languages(records, kept),
            similarities=_similarities(summary.similarities, threshold),
            threshold=threshold,
            advice=[*lines, *advice(summary)],
        )
    )


def _ledger(done: Kept) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the rows that stay, and the lines of the ledger with a finding."""
    from pyarrow.compute import is_valid
    from pyarrow.parquet import read_table

    table = read_table(done.ledger)
    actions = table.column("action").to_pylist()
    kept = [at for at, action in enumerate(actions[: done.entry.rows]) if action == KEPT]
    return kept, table.filter(is_valid(table.column("rule"))).to_pylist()


def _sections(
    found: Iterable[dict[str, Any]], records: Sequence[Record], counts: Mapping[str, int], dropped: Mapping[str, int]
) -> list[Section]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in found:
        lines.setdefault(line["rule"], []).append(line)
    sections = []
    for rule in sorted(lines, key=lambda rule: -counts.get(rule, 0)):
        ordered = sorted(lines[rule], key=lambda line: -(line["score"] or 0))
        worst, rest = ordered[:MOST_ROWS], ordered[MOST_ROWS:]
        borderline = rest[-MOST_ROWS:] if rest and (rest[-1]["score"] or 0) < (worst[0]["score"] or 0) else []
        sections.append(
            Section(
                rule=rule,
                found=counts.get(rule, 0),
                dropped=dropped.get(rule, 0),
                worst=[_example(line, records) for line in worst],
                borderline=[_example(line, records) for line in borderline],
            )
        )
    return sections


def _example(line: dict[str, Any], records: Sequence[Record]) -> Example:
    # A row that cannot be read has no record: its id follows those of all others.
    row = Row(records[line["id"]]) if line["id"] < len(records) else None
    text = "" if row is None else row.compared(Compared.both)
    answers = 0 if row is None else max(len(text) - len(row.compared(Compared.answer)), 0)
    beside, other = "", None
    if line["rule"] in (EXACT, NEAR, SEMANTIC) and line["witness"] is not None:
        witness = records[line["witness"]]
        parts, other = differences(text, Row(witness).compared(Compared.both))
        beside = witness.where
    else:
        parts = mark(text, line["evidence"] or "", answers, line["marked"] or "")
        if line["rule"] == CONTAMINATION:
            beside, other = f"{line['task']}, document {line['document']}", mark(line["asked"], line["evidence"] or "")
    return Example(
        where=line["where"], action=line["action"], score=line["score"], text=parts, beside=beside, other=other
    )


def mark(text: str, evidence: str, since: int = 0, words: str = "") -> Parts:
    """Return the evidence, or the ``words`` in it, marked, with what stands around it; behind a text without it.

    It is looked for behind ``since`` characters first: rules look at answers, and a prompt may have the same words.
    """
    pattern = r"\W+".join(map(re.escape, re.findall(r"\w+", evidence)))
    compiled = re.compile(pattern, re.IGNORECASE)
    found = (compiled.search(text, since) or compiled.search(text)) if pattern else None
    if found is None:
        parts = [(text[: 2 * AROUND], False)]
        return [*parts, (evidence, True)] if evidence else parts
    first, last = _span_of(words, text, *found.span())
    start, end = max(0, first - AROUND), last + AROUND
    before = ("…" if start else "") + text[start:first]
    after = text[last:end] + ("…" if end < len(text) else "")
    return [(part, marked) for part, marked in ((before, False), (text[first:last], True), (after, False)) if part]


def _span_of(words: str, text: str, start: int, end: int) -> tuple[int, int]:
    """Return the place of some words in a part of a text, or near its ends; of the part itself without any."""
    spelled = r"\s+".join(map(re.escape, words.split()))
    near = max(start - len(words), 0), end + len(words)  # the part was found by its letters: signs may stand beside it
    found = re.compile(spelled).search(text, *near) if spelled else None
    return (start, end) if found is None else found.span()


def differences(one: str, other: str) -> tuple[Parts, Parts]:
    """Return the first words of two texts, those marked that the other one has not at the same place."""
    first, second = SPACED.findall(one)[:MOST_WORDS], SPACED.findall(other)[:MOST_WORDS]
    matcher = difflib.SequenceMatcher(None, [*map(str.strip, first)], [*map(str.strip, second)], autojunk=False)
    left: Parts = []
    right: Parts = []
    for tag, a, b, c, d in matcher.get_opcodes():
        for parts, words in ((left, first[a:b]), (right, second[c:d])):
            if words:
                parts.append(("".join(words), tag != "equal"))
    return left, right


def _lengths(records: Sequence[Record], kept: Sequence[int]) -> list[Bar]:
    """Return the rows that stay by their words, in steps of twice as many."""
    counts: dict[int, int] = {}
    for row in kept:
        words = sum(len(text.split()) for pair in Row(records[row]).exchanges for text in pair)
        counts[words.bit_length()] = counts.get(words.bit_length(), 0) + 1
    steps = range(min(counts, default=0), max(counts, default=-1) + 1)
    return _bars([(f"{(1 << step) >> 1:,} to {(1 << step) - 1:,}", counts.get(step, 0), False) for step in steps])


def _languages(records: Sequence[Record], kept: Sequence[int]) -> list[Bar]:
    """Return some of the rows that stay by the language of their answers; none without the package for it."""
    if not is_installed():
        return []
    found = [language_of(Row(records[row]).answer) for row in kept[:: max(1, -(-len(kept) // MOST_JUDGED))]]
    counts = Counter(TOO_SHORT if each is None else each[0] for each in found)
    return _bars([(code, count, False) for code, count in counts.most_common()])


def _similarities(counts: Sequence[int], threshold: float) -> list[Bar]:
    size = len(counts) or 1
    labels = [f"{at / size:.2f} to {(at + 1) / size:.2f}" for at in range(len(counts))]
    return _bars([(label, counts[at], (at + 1) / size > threshold) for at, label in enumerate(labels)])


def _bars(values: Sequence[tuple[str, int, bool]]) -> list[Bar]:
    most = max((count for _, count, _ in values), default=0) or 1
    return [
        Bar(label=label, count=count, percent=round(100 * count / most, 1), marked=marked)
        for label, count, marked in values
    ]
