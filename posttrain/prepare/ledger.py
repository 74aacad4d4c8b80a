"""The ledger of rows: for every row that was read, what was found and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from posttrain.config.preparation import RULES, Action
from posttrain.data.records import Record
from posttrain.data.rows import BadRows
from posttrain.data.stored import origins_of
from posttrain.prepare.rows import DIGEST_BYTES
from posttrain.prepare.rules import EVIDENCE

EXACT, NEAR, SEMANTIC, CONTAMINATION = "exact", "near", "semantic", "contamination"
"""Names of the findings that concern two texts."""
UNREADABLE = "unreadable"
"""Name of the finding about a row that makes no record."""
BALANCE = ("length", "source", "group", "refused", "helpful", "sample")
"""Names of the findings of rows that are left out for the balance of the others."""
DATA, EVAL_DATA = "data", "eval_data"
"""Names of the sets of rows."""
KEPT, DROPPED = "keep", "drop"
COLUMNS = (
    ("id", "int64"), ("set", "set"), ("source", "int32"), ("path", "set"), ("row", "int64"), ("where", "string"),
    ("record", "binary"), ("action", "set"), ("rule", "set"), ("score", "float32"), ("witness", "int64"),
    ("task", "set"), ("document", "int64"), ("asked", "string"), ("evidence", "string"), ("findings", "list"),
    ("characters", "int64"), ("answer_characters", "int64"), ("cluster", "int64"),
    ("marked", "string"),
)  # fmt: skip
"""Columns of the ledger: ``set`` is data or eval_data, ``witness`` the id of the row that stays in a copy's place,
``asked`` the text of the gate's document that a row holds, ``cluster`` the id of the first row of those alike,
``marked`` the words within the evidence that are the fault."""
ORDER = (UNREADABLE, *RULES)
LAST = (CONTAMINATION, EXACT, NEAR, SEMANTIC, *BALANCE)
"""Rules in the order of preparation; those of plugins stand between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One finding about one row, with the recipe's action on it."""

    rule: str
    action: Action
    evidence: str
    score: float | None = None
    witness: int | None = None
    """Position of the row that stays in its place, among all rows."""
    task: str | None = None
    document: int | None = None
    asked: str | None = None
    """Text of the document."""
    marked: str = ""
    """The very words within the evidence."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Every row that was read: first those of ``data``, then those of ``eval_data``."""

    records: Sequence[Record]
    trained: int
    """Number of rows of ``data``."""
    digests: bytes
    """DIGEST_BYTES of every row, one after another."""
    found: Mapping[int, Sequence[Found]]
    """Findings by position, in the order of the rules."""
    unread: Sequence[tuple[str, BadRows]] = ()
    """Rows that cannot be read and are left out, by set and source; their ids follow those of all others."""
    similarities: Sequence[int] = ()
    """Pairs of rows that were compared, by similarity in bins of the same width from 0 to 1."""
    characters: Sequence[int] = ()
    """Characters of every row's prompts and answers."""
    answer_characters: Sequence[int] = ()
    """Characters of every row's answers alone."""
    clusters: Mapping[int, int] = field(default_factory=dict)
    """Number of the cluster of rows alike, by position; rows in none are absent."""

    def deciding(self, row: int) -> Found | None:
        """Return the finding for which a row is left out; None for a row that stays."""
        return next((found for found in self.found.get(row, ()) if found.action is Action.drop), None)

    def kept(self) -> list[int]:
        """Return the positions of the rows of ``data`` that stay."""
        return [row for row in range(self.trained) if self.deciding(row) is None]

    def write(self, path: Path, about: Mapping[str, str]) -> None:
        """Write a Parquet file, with ``about`` in its metadata."""
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        kinds = {
            "set": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
            "list": pyarrow.list_(pyarrow.string()),
        }
        columns = [(name, kinds.get(kind) or pyarrow.type_for_alias(kind)) for name, kind in COLUMNS]
        schema = pyarrow.schema(columns, metadata=dict(about))
        size = 50_000
        with ParquetWriter(path, schema, compression="zstd") as writer:
            rows = self._rows()
            for _ in range(0, len(self.records) or 1, size):
                writer.write_table(pyarrow.Table.from_pylist([*islice(rows, size)], schema=schema))
            if unread := list(self._unread_values()):
                writer.write_table(pyarrow.Table.from_pylist(unread, schema=schema))

    def _unread_values(self) -> Iterator[dict[str, Any]]:
        ids = count(len(self.records))
        for name, source in self.unread:
            for row in source.rows:
                evidence = f"{row.kind}: {row.what}"[:EVIDENCE]
                yield {
                    "id": next(ids), "set": name, "source": source.number, "path": source.path, "where": row.where,
                    "action": DROPPED, "rule": UNREADABLE, "evidence": evidence,
                    "findings": [f"{UNREADABLE}: {evidence}"],
                }  # fmt: skip

    def _rows(self) -> Iterator[dict[str, Any]]:
        seen: Counter[tuple[bool, int]] = Counter()
        for row, record in enumerate(self.records):
            source = (row < self.trained, record.origin.number)
            yield self._values(row, record, seen[source])
            seen[source] += 1

    def _values(self, row: int, record: Record, place: int) -> dict[str, Any]:
        """Return the values of a row; ``place`` is its number in its source."""
        found = self.found.get(row, ())
        decided = self.deciding(row)
        first = decided or next(iter(found), None)
        values = {
            "id": row,
            "set": DATA if row < self.trained else EVAL_DATA,
            "source": record.origin.number,
            "path": record.origin.path,
            "row": place,
            "where": record.where,
            "record": self.digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES],
            "action": KEPT if decided is None else DROPPED,
            "findings": [f"{each.rule}: {each.evidence}" for each in found],
            "characters": self.characters[row],
            "answer_characters": self.answer_characters[row],
            "cluster": self.clusters.get(row),
        }
        if first is not None:
            values |= {
                name: getattr(first, name)
                for name in ("rule", "score", "witness", "task", "document", "asked", "evidence", "marked")
            }
        return values

    def summary(self, tasks: Mapping[str, int]) -> Summary:
        """Return the counts of rows; ``tasks`` has the number of documents of each task compared."""
        sources: dict[int, Waterfall] = {}
        found: Counter[str] = Counter()
        touched: dict[str, set[int]] = {task: set() for task in tasks}
        trained: dict[str, set[int]] = {task: set() for task in tasks}
        for row, origin in enumerate(islice(origins_of(self.records), self.trained)):
            decided = self.deciding(row)
            source = sources.setdefault(origin.number, Waterfall(source=origin.path, read=0, kept=0, dropped={}))
            size, answers = self.characters[row], self.answer_characters[row]
            source.count(None if decided is None else decided.rule, size, answers)
            found.update({each.rule for each in self.found.get(row, ())})
            for each in self.found.get(row, ()):
                if each.task is not None and each.document is not None:
                    touched[each.task].add(each.document)
                    if decided is None:
                        trained[each.task].add(each.document)
        for bad in (bad for name, bad in self.unread if name == DATA):
            source = sources.setdefault(bad.number, Waterfall(source=bad.path, read=0, kept=0, dropped={}))
            for _ in bad.rows:
                source.count(UNREADABLE)
            found[UNREADABLE] += len(bad.rows)
        total = Waterfall(source="all", read=0, kept=0, dropped={})
        for source in sources.values():
            total.add(source)
        return Summary(
            read=total.read,
            kept=total.kept,
            dropped=in_order(total.dropped),
            found=in_order(found),
            sources=list(sources.values()),
            similarities=[*self.similarities],
            tasks={
                task: Touched(documents=count, touched=len(touched[task]), trained=len(trained[task]))
                for task, count in tasks.items()
            },
        )


def in_order(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts by rule in the order of preparation."""
    first, last = {rule: at for at, rule in enumerate(ORDER)}, {rule: at for at, rule in enumerate(LAST)}
    order = sorted(counts, key=lambda rule: (rule in last, first.get(rule, len(first)), last.get(rule, 0), rule))
    return {rule: counts[rule] for rule in order}


@dataclass(kw_only=True)
class Waterfall:
    """Rows of one source, from read to kept."""

    source: str
    read: int
    kept: int
    dropped: dict[str, int]
    """Rows left out, by the rule that left them out."""
    characters: int = 0
    """Characters of the rows that were read."""
    kept_characters: int = 0
    kept_answers: int = 0
    """Characters of the answers of the rows that stay."""
    dropped_characters: dict[str, int] = field(default_factory=dict)

    def count(self, rule: str | None, characters: int = 0, answers: int = 0) -> None:
        """Count one row, left out by ``rule`` or kept."""
        self.read += 1
        self.characters += characters
        if rule is None:
            self.kept += 1
            self.kept_characters += characters
            self.kept_answers += answers
        else:
            self.dropped[rule] = self.dropped.get(rule, 0) + 1
            self.dropped_characters[rule] = self.dropped_characters.get(rule, 0) + characters

    def add(self, other: Waterfall) -> None:
        """Add the rows of another source."""
        self.read, self.kept = self.read + other.read, self.kept + other.kept
        self.characters += other.characters
        self.kept_characters += other.kept_characters
        self.kept_answers += other.kept_answers
        self.dropped = in_order(Counter(self.dropped) + Counter(other.dropped))
        self.dropped_characters = in_order(Counter(self.dropped_characters) + Counter(other.dropped_characters))


@dataclass(frozen=True, kw_only=True)
class Touched:
    """Documents of a task of a gate."""

    documents: int
    touched: int
    """Documents that some row holds."""
    trained: int = 0
    """Documents that a row which stays holds."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Numbers of a stage's rows, before and after preparation."""

    read: int
    kept: int
    dropped: dict[str, int]
    """Rows left out, by the rule that left them out."""
    found: dict[str, int]
    """Rows with a finding, by rule, whatever its action."""
    sources: list[Waterfall] = field(default_factory=list)
    tasks: dict[str, Touched] = field(default_factory=dict)
    similarities: list[int] = field(default_factory=list)
    """Pairs of rows that were compared, by similarity in bins of the same width from 0 to 1."""
    tokens_per_character: list[float] = field(default_factory=list)
    """Measured for each of ``sources``; empty where nothing was measured."""

    def is_of_gates(self) -> bool:
        """Return whether every row that the rules leave holds a document of the gates, and none is left out for it."""
        compared = self.read - sum(count for rule, count in self.dropped.items() if rule not in LAST)
        return self.kept > 0 and CONTAMINATION not in self.dropped and self.found.get(CONTAMINATION) == compared

    def line(self) -> str:
        """Return one line for the display of a run."""
        left = ", ".join(f"{count:,} {rule}" for rule, count in self.dropped.items())
        counted = {rule: count - self.dropped.get(rule, 0) for rule, count in self.found.items()}
        also = ", ".join(f"{count:,} {rule}" for rule, count in counted.items() if count > 0)
        text = f"{self.kept:,} of {self.read:,} rows kept"
        return text + (f"; dropped: {left}" if left else "") + (f"; kept with findings: {also}" if also else "")
