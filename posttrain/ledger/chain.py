"""The chain: every row holds the hash of its content and of the row before it.

A ledger decides which adapter is served, so an edited row must be found. A hash per row would show an edit, but neither
a removed row nor two exchanged ones; the link to the row before shows both, and the count of rows ever written shows
rows removed from the end. A forger can hash all later rows anew: the copies in the runs (``audit.verify``) and a noted
hash of the last row find that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.digests import digest_of
from posttrain.errors import ArtifactDamaged
from posttrain.ledger.lift import Lift

MOST_FAULTS = 10
"""Faults listed in a message."""
START = ""
"""The previous hash of the first row."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A lift in its place in the chain."""

    seq: int
    """From 1, without gaps."""
    lift: Lift
    previous: str
    """Hash of the row before it."""
    hash: str


def link(lifts: Iterable[Lift], last: Row | None) -> Iterator[Row]:
    """Yield the rows of these lifts, linked to ``last`` and to each other."""
    seq, previous = (last.seq, last.hash) if last is not None else (0, START)
    for lift in lifts:
        row = Row(seq=seq + 1, lift=lift, previous=previous, hash=hash_of(asdict(lift), previous))
        yield row
        seq, previous = row.seq, row.hash


def hash_of(content: Mapping[str, Any], previous: str) -> str:
    """Return the SHA-256 of a row's content and its link."""
    return digest_of({**content, "previous": previous})


def faults(records: Sequence[Mapping[str, Any]], ever: int) -> list[str]:
    """Return every change made to written rows.

    ``records`` are the rows as SQLite holds them, ``ever`` is the number of rows ever written.
    """
    found = []
    seq, previous = 0, START
    for record in records:
        name = f"row {record['seq']} ({record['run']}, {record['stage']}, {record['task']})"
        if record["seq"] != seq + 1:
            found.append(f"rows were removed or inserted between row {seq} and row {record['seq']}")
        if not _is_sound(record):
            found.append(f"{name} was changed after it was written")
        elif record["previous"] != previous:
            found.append(f"{name} does not follow the row before it")
        seq, previous = record["seq"], record["hash"]
    if seq != ever:
        found.append(f"the chain ends with row {seq}, but {ever} rows were written")
    return found


def changed(path: Path, found: Sequence[str]) -> ArtifactDamaged:
    """Return the error for a ledger with these faults."""
    more = f"\n  and {len(found) - MOST_FAULTS} more" if len(found) > MOST_FAULTS else ""
    listed = "".join(f"\n  {fault}" for fault in found[:MOST_FAULTS])
    return ArtifactDamaged(f"{path} was changed after it was written:{listed}{more}")


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Tell whether a row's content has its hash."""
    content = {**record}
    del content["seq"], content["hash"]
    try:
        return bool(digest_of(content) == record["hash"])
    except (TypeError, ValueError):  # bytes, or a number that JSON does not have
        return False
