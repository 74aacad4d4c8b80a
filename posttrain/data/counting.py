"""How many records a stage has, as far as that can be told at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from posttrain.config.schema import Source
from posttrain.data.files import local_files

COUNTED_BYTES = 64_000_000
"""Size of a file up to which its lines are counted: a few hundredths of a second."""
PARSED_BYTES = 8_000_000
"""The same for a JSON array, which has to be read whole."""


def count_records(sources: Sequence[Source]) -> int | None:
    """The records of all sources in one epoch, their weights taken into account; None when it would take reading them.

    Lines of JSONL files are counted, the elements of JSON arrays, and the rows that Parquet files say they hold; other
    files, large ones and hub datasets count by their ``limit``, of which they are expected to have enough.
    """
    counts = [None if source.share else _count(source) for source in sources]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def count_in_file(path: Path) -> int | None:
    """The records of one file; None where counting would take long, or there is no telling what a record is."""
    if path.suffix not in COUNTERS:
        return None
    largest, count = COUNTERS[path.suffix]
    return count(path) if path.stat().st_size <= largest else None


def _count(source: Source) -> int | None:
    found = [count_in_file(path) for path in local_files(source.path) or []]
    known = [count for count in found if count is not None]
    count = source.limit
    if found and len(known) == len(found):
        count = sum(known) if source.limit is None else min(sum(known), source.limit)
    return None if count is None else round(count * source.weight)


def _lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if not line.isspace())


def _elements(path: Path) -> int | None:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # what is wrong with it is said where its records are read
        return None
    return len(values) if isinstance(values, list) else None


def _table_rows(path: Path) -> int | None:
    import pyarrow
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(path).num_rows)
    except pyarrow.ArrowException:  # as above
        return None


COUNTERS: Mapping[str, tuple[float, Callable[[Path], int | None]]] = {
    ".jsonl": (COUNTED_BYTES, _lines),
    ".json": (PARSED_BYTES, _elements),
    ".parquet": (math.inf, _table_rows),
}
"""Up to which size files of an ending are counted, and how."""
