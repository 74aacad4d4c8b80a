"""Documents of different lengths become rows of one length, with as few empty slots as possible.

    row of 12 slots      a a a a a  b b b b  c c .
    lengths              5          4        2
    position_ids         0 1 2 3 4  0 1 2 3  0 1
    cu_seqlens           0          5        9     11

A document is never split and never sees another: attention is confined by ``position_ids`` or ``cu_seqlens``, and no
position is asked for the first token of the next document.
"""

# T = tokens of one row, N = documents of one row

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posttrain.data.chat import Rendered
from posttrain.errors import BadInput, Problem

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents side by side, without padding."""

    input_ids: IntArray
    """Token ids, [T]."""
    mask: NDArray[np.bool_]
    """Whether a token is trained, [T]; never true for the first token of a document, which nothing predicts."""
    lengths: tuple[int, ...]
    """Tokens of each document, [N]; their sum is T."""

    def targets(self, ignore_index: int = -100) -> IntArray:
        """What each position has to predict, [T]: the next token of its document if it is trained.

        The last position of every document and those before an untrained token hold ``ignore_index``.
        """
        targets_T = np.full(len(self.input_ids), ignore_index, dtype=np.int32)
        targets_T[:-1] = np.where(self.mask[1:], self.input_ids[1:], ignore_index)
        return targets_T

    def position_ids(self) -> IntArray:
        """Positions counted from 0 in every document, [T]."""
        return np.concatenate([np.arange(length, dtype=np.int32) for length in self.lengths])

    def cu_seqlens(self) -> IntArray:
        """Where each document begins, and where the last one ends, [N + 1]."""
        return np.cumsum((0, *self.lengths), dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingCounts:
    """What became of the documents; ``documents == packed + untrained``."""

    documents: int
    """Documents that were given."""
    packed: int
    """Documents that stand in the rows."""
    untrained: int
    """Documents left out because no token of them is trained (any more, after they were cut)."""
    truncated: int
    """Documents in the rows of which only the first ``sequence_length`` tokens are kept."""
    cut_tokens: int
    """Tokens that truncated documents lost."""
    tokens: int
    """Tokens in the rows."""
    trained_tokens: int
    """Tokens in the rows that are targets."""
    rows: int
    """Number of rows."""
    sequence_length: int
    """Slots of a row."""

    @property
    def fill(self) -> float:
        """Share of the slots that hold a token."""
        return self.tokens / (self.rows * self.sequence_length)


@dataclass(frozen=True, slots=True)
class Packing:
    """Packed rows and what became of the documents."""

    rows: list[PackedRow]
    counts: PackingCounts


@dataclass(frozen=True, slots=True)
class _Document:
    ids: IntArray
    mask: NDArray[np.bool_]
    cut: int


def pack(documents: Sequence[Rendered], sequence_length: int, *, packing: bool = True) -> Packing:
    """Put documents into rows of at most ``sequence_length`` tokens, by best-fit decreasing.

    The same documents always give the same rows. Longer documents are cut at the end.

    Args:
        documents: Token ids with their masks.
        sequence_length: Slots of a row.
        packing: False gives every document a row of its own, in the order given.

    Raises:
        BadInput: No document has a trained token.
    """
    cut = [_cut(document, sequence_length) for document in documents]
    kept = [document for document in cut if document.mask.any()]
    if not kept:
        raise BadInput(_nothing_trained(documents, sequence_length))
    groups = best_fit([len(document.ids) for document in kept], sequence_length) if packing else _alone(len(kept))
    rows = [_row([kept[index] for index in group]) for group in groups]
    counts = PackingCounts(
        documents=len(documents),
        packed=len(kept),
        untrained=len(documents) - len(kept),
        truncated=sum(document.cut > 0 for document in kept),
        cut_tokens=sum(document.cut for document in kept),
        tokens=sum(len(row.input_ids) for row in rows),
        trained_tokens=sum(int(row.mask.sum()) for row in rows),
        rows=len(rows),
        sequence_length=sequence_length,
    )
    return Packing(rows, counts)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of ``capacity``: longest first, each into the fullest bin that still takes it.

    Best-fit decreasing needs at most 11/9 of the best number of bins, plus one (Johnson 1973, "Near-optimal bin
    packing algorithms"). Bins are kept by the space left in them, so an item costs one search among the spaces
    that occur.
    """
    bins: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space, number = capacity, len(bins)
            bins.append([])
        else:
            space = spaces[at]
            number = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
        bins[number].append(index)
        left = space - length
        if not with_space.setdefault(left, []):
            insort(spaces, left)
        with_space[left].append(number)
    return bins


def _alone(count: int) -> list[list[int]]:
    return [[index] for index in range(count)]


def _cut(document: Rendered, sequence_length: int) -> _Document:
    mask = np.array(document.mask[:sequence_length], dtype=np.bool_)
    mask[:1] = False
    ids = np.array(document.ids[:sequence_length], dtype=np.int32)
    return _Document(ids, mask, max(0, len(document.ids) - sequence_length))


def _row(documents: Sequence[_Document]) -> PackedRow:
    return PackedRow(
        np.concatenate([document.ids for document in documents]),
        np.concatenate([document.mask for document in documents]),
        tuple(len(document.ids) for document in documents),
    )


def _nothing_trained(documents: Sequence[Rendered], sequence_length: int) -> Problem:
    longest = max((len(document.ids) for document in documents), default=0)
    fix = f"The longest has {longest} tokens: raise sequence_length above {sequence_length}"
    what = f"no trained token in {len(documents)} records"
    return Problem(where="data", what=what, fix=fix if longest > sequence_length else "")
