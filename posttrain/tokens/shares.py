"""Sources with a share of all tokens, such as general text replayed beside a narrow one."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from posttrain.data.records import Document, Origin
from posttrain.errors import BadInput, Problem


@dataclass(frozen=True, slots=True)
class Size:
    """The tokens of a document in the rows."""

    tokens: int
    trained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShare:
    """The part of one source in the documents of a stage."""

    origin: Origin
    records: int
    """Records of the source, repeated by its weight."""
    taken: int
    """Records drawn: more than ``records`` when the source is too small for its share."""
    tokens: int
    trained: int
    """Trained tokens."""
    share: float
    """Share of all tokens."""

    def figures(self) -> dict[str, int]:
        """Return the counts for a manifest, without the path: moved files keep their digest."""
        return {"records": self.records, "taken": self.taken, "tokens": self.tokens, "trained_tokens": self.trained}

    def note(self) -> str:
        """Return the share in one line."""
        often = f", each {self.taken / self.records:.1f} times" if self.taken > self.records else ""
        drawn = f"{self.share:.1%} of the tokens, {self.taken:,} records drawn from {self.records:,}{often}"
        return f"{self.origin.path}: {drawn}"


def draw_by_share(records: Sequence[Document], sizes: Sequence[Size], seed: int) -> list[int]:
    """Return the indices of records with which every source with a share has that share of all tokens.

    All records of the sources without a share are taken: they set the number of tokens. The others give a seeded
    draw, as near to their share as whole records come, at least one; too small a source gives all of its records
    several times.

    Raises:
        BadInput: A source with a share has no tokens, or all others together have none.
    """
    groups = _by_origin(records)
    taken = [index for origin, group in groups.items() if not origin.share for index in group]
    shared = {origin: _usable(group, sizes) for origin, group in groups.items() if origin.share}
    if shared:
        _check_tokens(shared, taken, sizes)
    # The sources without a share are 1 - (sum of shares) of the whole, so they give its size.
    total = sum(sizes[index].tokens for index in taken) / (1 - sum(origin.share for origin in shared))
    for origin, group in shared.items():
        taken += _draw(group, sizes, origin.share * total, random.Random(f"share/{seed}/{origin.number}"))
    return sorted(taken)


def measure_shares(records: Sequence[Document], sizes: Sequence[Size], taken: Sequence[int]) -> list[SourceShare]:
    """Return the part of each source in the records ``taken``, in the order of the recipe."""
    drawn: dict[Origin, list[Size]] = {}
    for index in taken:
        drawn.setdefault(records[index].origin, []).append(sizes[index])
    total = sum(size.tokens for found in drawn.values() for size in found)
    counts = {origin: len(group) for origin, group in _by_origin(records).items()}
    return [_measure_share(origin, count, drawn.get(origin, []), total) for origin, count in counts.items()]


def _measure_share(origin: Origin, records: int, found: Sequence[Size], total: int) -> SourceShare:
    tokens = sum(size.tokens for size in found)
    return SourceShare(
        origin=origin,
        records=records,
        taken=len(found),
        tokens=tokens,
        trained=sum(size.trained for size in found),
        share=tokens / max(total, 1),
    )


def _by_origin(records: Sequence[Document]) -> dict[Origin, list[int]]:
    groups: dict[Origin, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.origin, []).append(index)
    return groups


def _usable(group: Sequence[int], sizes: Sequence[Size]) -> list[int]:
    return [index for index in group if sizes[index].tokens]


def _draw(group: Sequence[int], sizes: Sequence[Size], target: float, rng: random.Random) -> list[int]:
    """Return indices of ``group`` in a random order, repeated if need be, whose tokens come nearest to ``target``."""
    order = rng.sample(group, len(group))
    sums = [0, *accumulate(sizes[index].tokens for index in order)]
    whole, rest = divmod(target, sums[-1])
    end = bisect_left(sums, rest)
    nearest = end - 1 if end and rest - sums[end - 1] < sums[end] - rest else end
    return (order * int(whole) + order[:nearest]) or order[:1]


def _check_tokens(shared: Mapping[Origin, Sequence[int]], others: Sequence[int], sizes: Sequence[Size]) -> None:
    fix = "Raise sequence_length, or look at the records with posttrain tokens"
    problems = [
        Problem(where=origin.path, what="has a share of the tokens, but no record with a trained token", fix=fix)
        for origin, group in shared.items()
        if not group
    ]
    if not _usable(others, sizes):
        what = "the sources without a share have no record with a trained token"
        problems.append(Problem(where="data", what=what, fix=fix))
    if problems:
        raise BadInput(problems)
