"""Records of a stage on disk: each takes eight bytes of memory, and is read when it is asked for.

    ends      0    412    930 ...      record 1 is bytes 412 to 930
    origins   train.jsonl: from record 0, pairs.jsonl: from record 700

The file has no name and belongs to this process and those it forks: nothing is left of it, however they end.
"""

from __future__ import annotations

import os
import pickle
import weakref
from array import array
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import chain
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, overload

from posttrain.data.records import Conversation, Feedback, Origin, Preference, Question, Record, Text
from posttrain.data.rows import BadRows
from posttrain.disk import naming, read_at

AT_ONCE = 1 << 23
"""Bytes that are written at once; fewer than these stay in memory, without a file."""
AHEAD = 1 << 18
"""Bytes that are read at once: records are mostly asked for one after the other."""
KINDS: tuple[Any, ...] = (Conversation, Text, Preference, Feedback, Question)
NAMES = tuple(tuple(field.name for field in fields(kind) if field.name != "origin") for kind in KINDS)
VALUES = {kind: (number, attrgetter(*NAMES[number])) for number, kind in enumerate(KINDS)}
"""Number of each kind of record, and the function that takes its values, without its origin."""


class RecordFile:
    """Records in the order in which they were read, source by source."""

    def __init__(self, folder: Path | None = None) -> None:
        """Take the folder for the file, made when it is needed; without it, the system's for temporary files."""
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._waiting = bytearray()
        self._window = (0, b"")
        self._ends = array("q", [0])
        self._firsts = array("q")
        self._odd: dict[int, Record] = {}
        self.origins: list[Origin] = []
        """Origins of the records, in the order of their sources."""

    def __len__(self) -> int:
        return len(self._ends) - 1

    def begin(self, origin: Origin) -> None:
        """Give the records that follow this origin."""
        self.origins.append(origin)
        self._firsts.append(len(self))

    def append(self, record: Record) -> None:
        """Add a record. Raises OSError naming the folder when the disk takes no more."""
        number, values = VALUES[type(record)]
        try:
            data = pickle.dumps((number, values(record)), pickle.HIGHEST_PROTOCOL)
        except Exception:  # a plugin's reader may give any value, and its type raises what it likes
            self._odd[len(self)], data = record, b""
        self._waiting += data
        self._ends.append(self._ends[-1] + len(data))
        if len(self._waiting) >= AT_ONCE:
            self._write()

    def source(self, place: int) -> int:
        """Return the position in ``origins`` of a record's."""
        return bisect(self._firsts, place) - 1

    def record(self, place: int, origins: Sequence[Origin]) -> Record:
        """Return a record, with its origin from ``origins``, in the order of this file's."""
        origin = origins[self.source(place)]
        if self._odd and place in self._odd:
            kind: Any = type(self._odd[place])
            number, values = VALUES[kind][0], VALUES[kind][1](self._odd[place])
        else:
            number, values = pickle.loads(self._bytes(self._ends[place], self._ends[place + 1]))
        record: Record = KINDS[number](origin=origin, **dict(zip(NAMES[number], values, strict=True)))
        return record

    def _bytes(self, start: int, end: int) -> bytes | bytearray:
        if self._file is None:
            return self._waiting[start:end]
        if self._waiting:
            self._write()
        first, data = self._window
        if not first <= start <= end <= first + len(data):
            first, data = start, read_at(self._file.fileno(), max(end - start, AHEAD), start)
            self._window = first, data
        return data[start - first : end - first]

    def _write(self) -> None:
        if self._file is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115  open as long as the records
            weakref.finalize(self, self._file.close)
        waiting = memoryview(bytes(self._waiting))
        with naming(self._folder or Path(os.curdir)):
            while waiting:
                waiting = waiting[self._file.write(waiting) :]
        self._waiting.clear()


class StoredRecords(Sequence[Record]):
    """Some records of a file, in any order: a view, like all that are taken of it."""

    def __init__(
        self, file: RecordFile, bad: Sequence[BadRows] = (), places: Sequence[int] | None = None,
        origins: Sequence[Origin] | None = None,
    ) -> None:  # fmt: skip
        """Take all records of the file, or those at ``places``; ``origins`` stand in for the file's."""
        self._file = file
        self._places = range(len(file)) if places is None else places
        self._origins = file.origins if origins is None else origins
        self.bad = bad
        """The rows that make no record and are left out, for each source with any."""

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Record]:
        return (self._file.record(place, self._origins) for place in self._places)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return StoredRecords(self._file, self.bad, self._places[place], self._origins)
        return self._file.record(self._places[place], self._origins)

    def take(self, places: Sequence[int]) -> StoredRecords:
        """Return the records at ``places`` among these."""
        found = array("q", (self._places[place] for place in places))
        return StoredRecords(self._file, self.bad, found, self._origins)

    def with_origins(self, changed: dict[Origin, Origin]) -> StoredRecords:
        """Return these records with other origins."""
        origins = [changed.get(each, each) for each in self._origins]
        return StoredRecords(self._file, self.bad, self._places, origins)

    def origins(self) -> Iterator[Origin]:
        """Yield the origin of each record; none is read."""
        return (self._origins[self._file.source(place)] for place in self._places)


class JoinedRecords(Sequence[Record]):
    """Records of several sequences, one behind the other."""

    def __init__(self, *parts: Sequence[Record]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._firsts = [0]
        for part in self._parts:
            self._firsts.append(self._firsts[-1] + len(part))

    def __len__(self) -> int:
        return self._firsts[-1]

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(self._parts)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        at = range(len(self))[place]
        if isinstance(at, range):
            return [self[each] for each in at]
        part = bisect(self._firsts, at) - 1
        return self._parts[part][at - self._firsts[part]]

    def origins(self) -> Iterator[Origin]:
        """Yield the origin of each record."""
        return chain.from_iterable(map(origins_of, self._parts))


def origins_of(records: Sequence[Record]) -> Iterator[Origin]:
    """Yield the origin of each record; those on disk are not read for it."""
    if isinstance(records, StoredRecords | JoinedRecords):
        return records.origins()
    return (record.origin for record in records)


def take(records: Sequence[Record], places: Sequence[int]) -> Sequence[Record]:
    """Return the records at ``places``; those on disk stay there."""
    return records.take(places) if isinstance(records, StoredRecords) else [records[place] for place in places]
