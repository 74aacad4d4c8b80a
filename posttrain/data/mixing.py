"""All sources of a stage as one list of records, each source repeated by its weight."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from posttrain.config.schema import Source
from posttrain.data.reading import count_selected, read_records
from posttrain.data.records import Origin, Record
from posttrain.data.rows import BadRows
from posttrain.errors import BadInput, Problem, reject


class Mix(list[Record]):
    """The records of all sources of a stage, and the rows of them that cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[BadRows] = []
        """The rows left out, for each source with any."""


def read_sources(
    sources: Sequence[Source], shape: str, seed: int, cache: Path | None = None, max_bad_share: float = 0.0
) -> Mix:
    """Read the records of all sources, source by source, each record repeated by the weight; see ``weigh``.

    Raises BadInput as ``read_rows`` does.
    """
    return weigh(read_rows(sources, shape, cache, max_bad_share), seed)


def read_rows(sources: Sequence[Source], shape: str, cache: Path | None = None, max_bad_share: float = 0.0) -> Mix:
    """Read every record of all sources but those with ``on_policy`` once, source by source.

    A ``share`` is a share of tokens, unknown here: records carry their origin for ``tokens.shares``. Rows that cannot
    be read are left out up to the source's ``max_bad_share``, or up to that of the stage, of all rows together.

    Raises:
        BadInput: There is no source, one cannot be read, none of its rows can, or more of them cannot than may be left
            out; the first ten of each kind are named, of all sources at once.
    """
    if not sources:
        reject("data", "names no source of records")
    read, problems, sifted = Mix(), [], []
    for number, source in enumerate(sources):
        if source.on_policy is not None:  # its records are sampled when the stage starts
            continue
        origin = Origin(number=number, path=source.path, share=source.share or 0.0, weight=float(source.weight))
        bad = BadRows(path=source.path, number=number)
        try:
            read += [replace(record, origin=origin) for record in bad.sift(read_records(source, shape, cache))]
        except BadInput as error:
            # The rows before the place at which a file ends the reading are named all the same.
            problems += [row.problem() for row in bad.first() if row.problem() not in error.problems] + error.problems
            continue
        sifted.append((bad, source.max_bad_share))
    read.bad = [bad for bad, _ in sifted if bad.rows]
    problems += _too_bad(sifted, max_bad_share)
    if problems:
        raise BadInput(problems)
    return read


def _too_bad(sifted: Sequence[tuple[BadRows, float]], max_bad_share: float) -> list[Problem]:
    """Return the problems of the sources with more bad rows than they, and all of them together, may have."""
    rows, bad_rows = sum(bad.read for bad, _ in sifted), sum(len(bad.rows) for bad, _ in sifted)
    few = bad_rows <= max_bad_share * rows
    problems: list[Problem] = []
    for bad, most in sifted:
        try:
            bad.check(1.0 if few else most)
        except BadInput as error:
            problems += error.problems
    return problems


def weigh(records: Sequence[Record], seed: int) -> Mix:
    """Return the records, those of each source repeated by its weight.

    A source of weight 2 gives each record twice, of weight 0.5 a random half, of weight 1.5 all and a random half;
    a fraction is rounded to whole records, at least one. The same seed takes the same records.
    """
    mixed = Mix()
    mixed.bad = records.bad if isinstance(records, Mix) else []
    for origin, group in groupby(records, key=attrgetter("origin")):
        # Each source draws by its own number: adding a source leaves the draws of those before it alone.
        mixed += _repeat(list(group), origin.weight, random.Random(f"mix/{seed}/{origin.number}"))
    return mixed


def count_records(sources: Sequence[Source]) -> int | None:
    """Return the number of records in one epoch, weights included; None when it takes reading them."""
    counts = [None if source.share or source.on_policy else count_selected(source) for source in sources]
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


def describe_bad(records: Iterable[Record]) -> list[str]:
    """Return a line about the rows of each source that are left out because they cannot be read."""
    left_out = records.bad if isinstance(records, Mix) else []
    return [f"{bad.path}: {bad.summary()} and are left out, first {bad.rows[0].where}" for bad in left_out]


def _repeat(records: list[Record], weight: float, rng: random.Random) -> list[Record]:
    whole = math.floor(weight)
    part = round((weight - whole) * len(records))
    part = max(part, 1) if whole == 0 else part
    return records * whole + [records[index] for index in sorted(rng.sample(range(len(records)), part))]
