"""All sources of a stage as one list of records, each source repeated by its weight."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from posttrain.config.schema import Source
from posttrain.data.reading import count_selected, read_source
from posttrain.data.records import Conversation, Origin, Record, Text
from posttrain.errors import reject


def read_sources(sources: Sequence[Source], shape: str, seed: int) -> list[Record]:
    """Read the records of all sources, source by source, each record repeated by the weight.

    A source of weight 2 gives each record twice, of weight 0.5 a random half, of weight 1.5 all and a random half;
    a fraction is rounded to whole records, at least one. The same seed takes the same records. A ``share`` is a share
    of tokens, unknown here: documents carry their origin for ``tokens.shares``.

    Raises:
        BadInput: There is no source, or one cannot be read.
    """
    if not sources:
        reject("data", "names no source of records")
    mixed: list[Record] = []
    for number, source in enumerate(sources):
        origin = Origin(number=number, path=source.path, share=source.share or 0.0)
        records = [_with_origin(record, origin) for record in read_source(source, shape)]
        # Each source draws by its own number: adding a source leaves the draws of those before it alone.
        mixed += _repeat(records, source.weight, random.Random(f"mix/{seed}/{number}"))
    return mixed


def count_records(sources: Sequence[Source]) -> int | None:
    """Return the number of records in one epoch, weights included; None when it takes reading them."""
    counts = [None if source.share else count_selected(source) for source in sources]
    known = [round(count * source.weight) for count, source in zip(counts, sources, strict=True) if count is not None]
    return sum(known) if len(known) == len(counts) else None


def describe_unread(records: Iterable[Record]) -> list[str]:
    """Return a line with the keys of rows that nothing reads, each with its count and first place; none for no key."""
    places: dict[str, dict[str, None]] = {}
    for record in records:
        for key in record.unread:
            places.setdefault(key, {})[record.where] = None
    named = [f"{key!r} ({len(found):,} records, first {next(iter(found))})" for key, found in places.items()]
    return [f"nothing reads these keys of the data: {', '.join(named)}"] if named else []


def _with_origin(record: Record, origin: Origin) -> Record:
    return replace(record, origin=origin) if isinstance(record, Conversation | Text) else record


def _repeat(records: list[Record], weight: float, rng: random.Random) -> list[Record]:
    whole = math.floor(weight)
    part = round((weight - whole) * len(records))
    part = max(part, 1) if whole == 0 else part
    return records * whole + [records[index] for index in sorted(rng.sample(range(len(records)), part))]
