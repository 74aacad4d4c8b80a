"""All sources of a stage as one list of records, each source repeated by its weight."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from posttrain.config.schema import Source
from posttrain.data.reading import count_selected, read_records
from posttrain.data.records import Origin, Record
from posttrain.data.rows import BadRows
from posttrain.data.stored import RecordFile, StoredRecords, origins_of, take
from posttrain.errors import BadInput, Problem, reject


def read_sources(
    sources: Sequence[Source], shape: str, seed: int, cache: Path | None = None, max_bad_share: float = 0.0
) -> StoredRecords:
    """Read the records of all sources, source by source, each record repeated by the weight; see ``weigh``.

    Raises BadInput as ``read_rows`` does.
    """
    read = read_rows(sources, shape, cache, max_bad_share)
    return read.take(_weighed(read, seed))


def read_rows(
    sources: Sequence[Source], shape: str, cache: Path | None = None, max_bad_share: float = 0.0
) -> StoredRecords:
    """Read every record of all sources but those with ``on_policy`` once, source by source.

    A ``share`` is a share of tokens, unknown here: records carry their origin for ``tokens.shares``. Rows that cannot
    be read are left out up to the source's ``max_bad_share``, or up to that of the stage, of all rows together. The
    records are kept in a file in ``cache``, the folder for copies, where they are more than few.

    Raises:
        BadInput: There is no source, one cannot be read, none of its rows can, or more of them cannot than may be left
            out; the first ten of each kind are named, of all sources at once.
    """
    if not sources:
        reject("data", "names no source of records")
    file, problems, sifted = RecordFile(cache), [], []
    for number, source in enumerate(sources):
        if source.on_policy is not None:  # its records are sampled when the stage starts
            continue
        origin = Origin(number=number, path=source.path, share=source.share or 0.0, weight=float(source.weight))
        bad = BadRows(path=source.path, number=number)
        try:
            file.begin(origin)
            for record in bad.sift(read_records(source, shape, cache)):
                file.append(record)
        except BadInput as error:
            # The rows before the place at which a file ends the reading are named all the same.
            problems += [row.problem() for row in bad.first() if row.problem() not in error.problems] + error.problems
            continue
        sifted.append((bad, source.max_bad_share))
    problems += _too_bad(sifted, max_bad_share)
    if problems:
        raise BadInput(problems)
    return StoredRecords(file, [bad for bad, _ in sifted if bad.rows])


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


def weigh(records: Sequence[Record], seed: int) -> Sequence[Record]:
    """Return the records, those of each source repeated by its weight.

    A source of weight 2 gives each record twice, of weight 0.5 a random half, of weight 1.5 all and a random half;
    a fraction is rounded to whole records, at least one. The same seed takes the same records.
    """
    return take(records, _weighed(records, seed))


def _weighed(records: Sequence[Record], seed: int) -> array[int]:
    """Return the places of the records, repeated by weight."""
    places, first = array("q"), 0
    for origin, run in groupby(origins_of(records)):
        end = first + sum(1 for _ in run)
        # Each source draws by its own number: adding a source leaves the draws of those before it alone.
        places += _repeat(range(first, end), origin.weight, random.Random(f"mix/{seed}/{origin.number}"))
        first = end
    return places


def count_records(sources: Sequence[Source]) -> int | None:
    """Return the number of records in one epoch, weights included; None when it takes reading them."""
    counts = [None if source.share or source.on_policy else count_selected(source) for source in sources]
    known = [round(count * source.weight) for count, source in zip(counts, sources, strict=True) if count is not None]
    return sum(known) if len(known) == len(counts) else None


def describe_unread(records: Iterable[Record]) -> list[str]:
    """Return a line with the keys of rows that nothing reads, each with its count and first place; none for no key."""
    firsts: dict[str, str] = {}
    hashes: dict[str, array[int]] = {}
    for record in records:
        for key in record.unread:
            firsts.setdefault(key, record.where)
            hashes.setdefault(key, array("q")).append(hash(record.where))  # texts of a million places are 100 MB
    named = [f"{key!r} ({len(set(hashes.pop(key))):,} records, first {first})" for key, first in firsts.items()]
    return [f"nothing reads these keys of the data: {', '.join(named)}"] if named else []


def describe_bad(records: Sequence[Record]) -> list[str]:
    """Return a line about the rows of each source that are left out because they cannot be read."""
    left_out = records.bad if isinstance(records, StoredRecords) else []
    return [f"{bad.path}: {bad.summary()} and are left out, first {bad.rows[0].where}" for bad in left_out]


def _repeat(places: range, weight: float, rng: random.Random) -> array[int]:
    whole = math.floor(weight)
    part = round((weight - whole) * len(places))
    part = max(part, 1) if whole == 0 else part
    drawn = sorted(rng.sample(range(len(places)), part))
    return array("q", places) * whole + array("q", (places[at] for at in drawn))
