"""Formats of files that plugins read, by the endings of the files.

Those of the last loaded host hold for this process, as the ending of a file is looked at in many places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

OWN_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst")
"""Endings that posttrain reads itself: no plugin has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A format of files, as a plugin registers it."""

    name: str
    """Name of the format, in messages and in counts of rows that cannot be read."""
    suffix: str
    """Ending of its files, such as ``.qa``; ``.qa.gz`` and ``.qa.zst`` are unpacked before they are read."""
    version: str
    """Version of its answers: another one reads and prepares the data again, and trains on them again."""
    read: Callable[[BinaryIO], Iterable[tuple[int, Mapping[str, Any] | str]]]
    """Yields the records of an open file: the line of each, from 1, with its keys, or with the reason in words why it
    cannot be read."""


known: dict[str, Reader] = {}
"""The readers in use, by ending."""


def use(readers: Mapping[str, tuple[str, Reader]]) -> None:
    """Take these readers, each with the name of its plugin, by their endings, in place of all others."""
    known.clear()
    known.update({suffix: reader for suffix, (_, reader) in readers.items()})
