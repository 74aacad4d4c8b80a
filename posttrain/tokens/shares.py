"""Sources with a share of all tokens, such as general text replayed beside a narrow one."""

# M = documents

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posttrain.data.records import Origin
from posttrain.errors import BadInput, Problem

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sizes:
    """The documents of a stage, before some are drawn."""

    origins: Sequence[Origin]
    """The sources, in the order of their first documents."""
    numbers: Numbers
    """The place of each document's source in ``origins``, [M]."""
    tokens: Numbers
    """The tokens of each document in the rows, [M]."""
    trained: Numbers
    """Its trained tokens, [M]."""

    def by_origin(self) -> dict[Origin, Numbers]:
        """Return the documents of each source that has any."""
        groups = {origin: np.flatnonzero(self.numbers == number) for number, origin in enumerate(self.origins)}
        return {origin: group for origin, group in groups.items() if len(group)}


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


def draw_by_share(sizes: Sizes, seed: int) -> Numbers:
    """Return the documents with which every source with a share has that share of all tokens, in their order.

    All documents of the sources without a share are taken: they set the number of tokens. The others give a seeded
    draw, as near to their share as whole documents come, at least one; too small a source gives all of its documents
    several times.

    Raises:
        BadInput: A source with a share has no tokens, or all others together have none.
    """
    groups = sizes.by_origin()
    shared = {origin: group[sizes.tokens[group] > 0] for origin, group in groups.items() if origin.share}
    if not shared:
        return np.arange(len(sizes.numbers))
    others = [group for origin, group in groups.items() if not origin.share]
    total = sum(int(sizes.tokens[group].sum()) for group in others)
    _check_tokens(shared, total)
    # The sources without a share are 1 - (sum of shares) of the whole, so they give its size.
    whole = total / (1 - sum(origin.share for origin in shared))
    drawn = [
        _draw(group, sizes.tokens, origin.share * whole, random.Random(f"share/{seed}/{origin.number}"))
        for origin, group in shared.items()
    ]
    return np.sort(np.concatenate([*others, *drawn]))


def measure_shares(sizes: Sizes, taken: Numbers) -> list[SourceShare]:
    """Return the part of each source in the documents ``taken``, in the order of the recipe."""
    total, numbers = int(sizes.tokens[taken].sum()), sizes.numbers[taken]
    counts = {origin: len(group) for origin, group in sizes.by_origin().items()}
    return [
        _measure_share(origin, counts[origin], sizes, taken[numbers == number], total)
        for number, origin in enumerate(sizes.origins)
        if origin in counts
    ]


def _measure_share(origin: Origin, records: int, sizes: Sizes, taken: Numbers, total: int) -> SourceShare:
    tokens = int(sizes.tokens[taken].sum())
    return SourceShare(
        origin=origin,
        records=records,
        taken=len(taken),
        tokens=tokens,
        trained=int(sizes.trained[taken].sum()),
        share=tokens / max(total, 1),
    )


def _draw(group: Numbers, tokens: Numbers, target: float, rng: random.Random) -> Numbers:
    """Return documents of ``group`` in a random order, repeated if need be, whose tokens come nearest to ``target``."""
    order = np.array(rng.sample(group.tolist(), len(group)))
    sums = np.concatenate([[0], np.cumsum(tokens[order])])
    whole, rest = divmod(target, float(sums[-1]))
    end = int(np.searchsorted(sums, rest))
    nearest = end - 1 if end and rest - sums[end - 1] < sums[end] - rest else end
    drawn = np.concatenate([np.tile(order, int(whole)), order[:nearest]])
    return drawn if len(drawn) else order[:1]


def _check_tokens(shared: Mapping[Origin, Numbers], others: int) -> None:
    fix = "Raise sequence_length, or look at the records with posttrain tokens"
    problems = [
        Problem(where=origin.path, what="has a share of the tokens, but no record with a trained token", fix=fix)
        for origin, group in shared.items()
        if not len(group)
    ]
    if not others:
        what = "the sources without a share have no record with a trained token"
        problems.append(Problem(where="data", what=what, fix=fix))
    if problems:
        raise BadInput(problems)
