"""How many records a stage has, as far as that can be told at once."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.config.schema import Source
from posttrain.data.files import local_files

COUNTED_BYTES = 64_000_000
"""Size of a file up to which its lines are counted: about 0.1 s."""


def count_records(sources: Sequence[Source]) -> int | None:
    """The records of all sources in one epoch, their weights taken into account; None when it would take reading them.

    Lines of JSONL files are counted; other files, large ones and hub datasets count by their ``limit``, of which they
    are expected to have enough.
    """
    counts = [None if source.share else _count(source) for source in sources]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _count(source: Source) -> int | None:
    files = local_files(source.path)
    count = source.limit
    if files and all(path.suffix == ".jsonl" and path.stat().st_size <= COUNTED_BYTES for path in files):
        found = 0
        for path in files:
            with path.open("rb") as lines:
                found += sum(1 for line in lines if not line.isspace())
        count = found if source.limit is None else min(found, source.limit)
    return None if count is None else round(count * source.weight)
