"""The chain: every row holds the hash of its content and of the row before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.digests import digest_of
from posttrain.ledger.lift import KINDS, Lift

START = ""
"""What the first row holds as the hash of the row before it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A lift in its place."""

    seq: int
    """From 1, without gaps."""
    lift: Lift
    previous: str
    """Hash of the row before it."""
    hash: str


def linked(lifts: Iterable[Lift], last: Row | None) -> Iterator[Row]:
    """The rows that follow ``last``."""
    seq, previous = (last.seq, last.hash) if last is not None else (0, START)
    for lift in lifts:
        row = Row(seq=seq + 1, lift=lift, previous=previous, hash=hash_of(asdict(lift), previous))
        yield row
        seq, previous = row.seq, row.hash


def hash_of(content: Mapping[str, Any], previous: str) -> str:
    """SHA-256 of a row's content and its link."""
    return digest_of({**content, "previous": previous})


def faults(records: Sequence[Mapping[str, Any]], ever: int) -> list[str]:
    """What was done to rows as SQLite holds them after they were written; ``ever`` rows were added in all."""
    found = []
    seq, previous = 0, START
    for record in records:
        name = f"row {record['seq']} ({record['run']}, {record['stage']}, {record['task']})"
        if record["seq"] != seq + 1:
            found.append(f"between row {seq} and row {record['seq']} rows were taken out or put in")
        if not _sound(record):
            found.append(f"{name} was changed after it was written")
        elif record["previous"] != previous:
            found.append(f"{name} does not follow the row that stands before it")
        seq, previous = record["seq"], record["hash"]
    if seq != ever:
        found.append(f"the chain ends with row {seq}, but {ever} rows were written")
    return found


def _sound(record: Mapping[str, Any]) -> bool:
    """Whether a row's content is what its hash says."""
    content = {name: record[name] for name in KINDS}
    try:
        return bool(hash_of(content, record["previous"]) == record["hash"])
    except (TypeError, ValueError):  # bytes, or a number that JSON does not have
        return False
