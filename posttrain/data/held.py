"""Records of a stage, held in memory only while they are needed: their number and their digest stay known.

A recipe may have many stages, and all of their data is read and checked before the first one trains. Records that are
let go are read again when they are asked for, and proven to be the ones that were checked.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from hashlib import sha256
from operator import attrgetter
from typing import Any, overload

from posttrain.data.records import Origin, Record
from posttrain.errors import reject

MARSHAL = 2
"""Version of the format in which equal values have equal bytes: later ones also write which of them are one object."""


class HeldRecords(Sequence[Any]):
    """A sequence of records that is read again after it was let go."""

    def __init__(
        self,
        read: Callable[[], Sequence[Record]],
        *,
        count: int,
        digest: str,
        where: str = "data",
        held: Sequence[Record] | None = None,
    ) -> None:
        """Take what is known of the records; ``read`` returns them, and ``where`` is their setting, for messages."""
        self._read, self._held, self._count, self._where = read, held, count, where
        self.digest = digest
        """As ``digest_records`` returns it."""

    @classmethod
    def of(cls, read: Callable[[], Sequence[Record]], where: str = "data") -> HeldRecords:
        """Read the records, and hold them."""
        held = read()
        return cls(read, count=len(held), digest=digest_records(held), where=where, held=held)

    def release(self) -> None:
        """Let the records go."""
        self._held = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        return iter(self.all())

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        return self.all()[place]

    def all(self) -> Sequence[Record]:
        """Return the records as they were read. Raises BadInput for others than those of the first reading."""
        if self._held is None:
            found = self._read()
            if digest_records(found) != self.digest:
                reject(self._where, "the data changed after it was checked", "Run the same command again")
            self._held = found
        return self._held


def release(records: Sequence[Any]) -> None:
    """Let records go that can be read again."""
    if isinstance(records, HeldRecords):
        records.release()


def digest_records(records: Iterable[Record]) -> str:
    """Return the SHA-256 of records, in their order, with their places and origins."""
    if isinstance(records, HeldRecords):
        return records.digest
    digest = sha256()
    for record in records:
        kind: Any = type(record)
        values = (kind.__name__, *_values_of(kind)(record))
        try:
            digest.update(marshal.dumps(values, MARSHAL))
        except ValueError:  # a plugin's records may hold any type
            digest.update(marshal.dumps(_as_plain(values), MARSHAL))
    return digest.hexdigest()


@cache
def _values_of(kind: Any) -> Callable[[Record], tuple[Any, ...]]:
    """Return the function that takes the values of a record of one kind."""
    names = [field.name for field in fields(kind)]
    if "origin" in names:
        names[names.index("origin")] = "origin.number"
        names += [f"origin.{field.name}" for field in fields(Origin)]
    return attrgetter(*names)


def _as_plain(value: Any) -> Any:
    """Return a value of exact built-in types, equal for equal ones; any other value as its ``repr``."""
    if isinstance(value, Mapping):
        return {_as_plain(key): _as_plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_as_plain, value))
    if isinstance(value, list):
        return list(map(_as_plain, value))
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value if value is None or isinstance(value, bytes) else ("repr", repr(value))
