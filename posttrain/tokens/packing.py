"""Documents of different lengths packed into rows of one length, with as few empty slots as possible.

    row of 12 slots      a0 a1 a2 a3 a4  b0 b1 b2 b3  c0 c1  .
    mask                  .  .  .  T  T   .  .  T  T   .  T       T = trained
    targets               .  . a3 a4  .   . b2 b3  .  c1  .       the next token, at the position that predicts it
    lengths               5               4            2
    position_ids          0  1  2  3  4   0  1  2  3   0  1
    cu_seqlens            0               5            9     11

Documents stay isolated: ``engine.attention`` confines each to its own tokens by ``lengths``, and the last position of
a document predicts nothing. Otherwise the loss of a document would depend on its neighbours, and packing, a matter of
speed, would change the model.
"""

# T = tokens of one row, N = documents of one row, or items of all bins

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from posttrain.config.schema import Overlong
from posttrain.errors import BadInput, Problem
from posttrain.tokens.best_fit import best_fit
from posttrain.tokens.bins import Bins
from posttrain.tokens.chat import Rendered
from posttrain.tokens.exact_fit import exact_fit
from posttrain.tokens.overlong import Pieces, check_lengths, cut
from posttrain.tokens.table import Documents, Indices, TokenTable

IntArray = NDArray[np.int32]

ENOUGH = 1.005
"""Slots per token, good enough to end the search: half a percent of empty slots is not worth a second try."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Documents side by side, without padding."""

    input_ids: IntArray
    """Token ids, [T]."""
    mask: NDArray[np.bool_]
    """True for a trained token, [T]; never for the first token of a document, which no token predicts."""
    lengths: tuple[int, ...]
    """Tokens of each document, [N]; their sum is T."""

    def targets(self, ignore_index: int = -100) -> IntArray:
        """Return the token to predict at each position, [T]: the next one of its document if it is trained.

        The last position of every document and those before an untrained token hold ``ignore_index``.
        """
        # The mask is never true for the first token of a document, so a shift by one cannot cross a border.
        targets_T = np.full(len(self.input_ids), ignore_index, dtype=np.int32)
        targets_T[:-1] = np.where(self.mask[1:], self.input_ids[1:], ignore_index)
        return targets_T

    def position_ids(self) -> IntArray:
        """Return positions counted from 0 in every document, [T]."""
        return np.concatenate([np.arange(length, dtype=np.int32) for length in self.lengths])

    def cu_seqlens(self) -> IntArray:
        """Return the first position of each document, and the end of the last one, [N + 1]."""
        return np.cumsum((0, *self.lengths), dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingCounts:
    """Counts of documents and tokens; ``documents == packed + untrained``."""

    documents: int
    """Documents to pack."""
    packed: int
    """Documents in the rows, whole or in part."""
    untrained: int
    """Documents left out because they have no trained token, as given or once they are cut."""
    truncated: int
    """Documents in the rows with only their first ``sequence_length`` tokens."""
    split: int
    """Split documents in the rows."""
    pieces: int
    """Isolated parts of the rows: whole documents, and every piece of the others."""
    cut_tokens: int
    """Tokens lost from truncated documents, and tokens in pieces without a trained token."""
    unpredicted: int
    """Trained tokens at the beginning of a piece, where no token predicts them."""
    tokens: int
    """Tokens in the rows."""
    trained_tokens: int
    """Targets in the rows."""
    rows: int
    """Number of rows."""
    sequence_length: int
    """Slots of a row."""

    @property
    def fill(self) -> float:
        """Share of the slots with a token."""
        return self.tokens / (self.rows * self.sequence_length)

    def notes(self) -> Iterator[str]:
        """Yield a line for each kind of change and loss on the way into the rows."""
        longer = f"of {self.documents:,} records are longer than {self.sequence_length:,} tokens"
        if self.truncated:
            yield f"{self.truncated:,} {longer} and cut there: {self.cut_tokens:,} tokens lost (overlong=truncate)"
        if self.split:
            lost = f"{self.unpredicted:,} tokens begin a piece and are not trained"
            left = f", {self.cut_tokens:,} are in pieces without a trained token" if self.cut_tokens else ""
            yield f"{self.split:,} {longer} and split: {lost}{left} (overlong=split)"
        if self.untrained:
            yield f"{self.untrained:,} of {self.documents:,} records have no trained token and are left out"


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows(Sequence[PackedRow]):
    """Rows of pieces of a table; each is put together when it is asked for."""

    pieces: Pieces
    bins: Bins
    """The pieces of each row."""

    def __len__(self) -> int:
        return len(self.bins)

    @overload
    def __getitem__(self, index: int) -> PackedRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[PackedRow]: ...
    def __getitem__(self, index: int | slice) -> PackedRow | list[PackedRow]:
        if isinstance(index, slice):
            return [self._row(number) for number in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    @property
    def tokens(self) -> Indices:
        """Tokens of each row, [R]."""
        return self._summed(self.pieces.lengths)

    @property
    def trained(self) -> Indices:
        """Trained tokens of each row, [R]."""
        return self._summed(self.pieces.trained)

    def content(self) -> bytes:
        """Return all that decides the tokens, the masks and the documents of the rows; the tokens by their digest."""
        places = (self.pieces.starts[self.bins.order], self.pieces.lengths[self.bins.order], self.bins.ends)
        digests = repr(self.pieces.documents.table.content()).encode()
        return digests + b"".join(each.astype("<i8").tobytes() for each in places)

    def _summed(self, values_P: Indices) -> Indices:
        totals_R = np.cumsum(values_P[self.bins.order])[self.bins.ends - 1]
        return np.diff(totals_R, prepend=0)

    def _row(self, index: int) -> PackedRow:
        chosen = self.bins.items(index)
        lengths = self.pieces.lengths[chosen].tolist()
        starts = self.pieces.starts[chosen].tolist()
        table = self.pieces.documents.table
        spans = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        if len(spans) == 1 and not table.mask[starts[0]]:
            return PackedRow(table.ids[spans[0]], table.mask[spans[0]], (lengths[0],))
        mask_T = np.concatenate([table.mask[span] for span in spans])
        mask_T[np.cumsum([0, *lengths[:-1]])] = False
        return PackedRow(np.concatenate([table.ids[span] for span in spans]), mask_T, tuple(lengths))


@dataclass(frozen=True, slots=True)
class Packing:
    """Packed rows with their counts."""

    rows: PackedRows
    counts: PackingCounts


def pack(
    documents: Documents | Sequence[Rendered],
    sequence_length: int,
    *,
    packing: bool = True,
    overlong: Overlong = Overlong.truncate,
) -> Packing:
    """Put documents into rows of at most ``sequence_length`` tokens, as few rows as ``few_bins`` finds.

    The same documents always give the same rows.

    Args:
        documents: Token ids with their masks.
        sequence_length: Slots of a row.
        packing: False gives every document a row of its own, in the order given.
        overlong: Treatment of documents longer than a row.

    Raises:
        BadInput: No document has a trained token, or one is longer than a row and ``overlong`` is reject.
    """
    chosen = documents if isinstance(documents, Documents) else TokenTable.of(documents).all()
    if overlong is Overlong.reject:
        check_lengths(chosen, sequence_length)
    pieces = cut(chosen, sequence_length, overlong)
    if not len(pieces.starts):
        raise BadInput(_nothing_trained(chosen, sequence_length))
    bins = few_bins(pieces.lengths, sequence_length) if packing else _alone(len(pieces.starts))
    rows = PackedRows(pieces, bins)
    return Packing(rows, _counts(pieces, len(rows), sequence_length))


def few_bins(lengths: Sequence[int] | Indices, capacity: int) -> Bins:
    """Return the indices of ``lengths`` (1 to ``capacity``) in bins: by best fit, or by exact fit if that is better.

    Best fit leaves hardly a gap when items are much shorter than a bin. When a few items fill a bin, exact fit is
    often better. The same lengths always give the same bins.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    bins = best_fit(lengths_N, capacity)
    if len(bins) * capacity <= ENOUGH * int(lengths_N.sum()):
        return bins
    return min(bins, exact_fit(lengths_N, capacity), key=len)


def _alone(count: int) -> Bins:
    return Bins(np.arange(count), np.arange(1, count + 1))


def _counts(pieces: Pieces, rows: int, sequence_length: int) -> PackingCounts:
    documents = pieces.documents
    kept_M, tokens_M = pieces.pieces_of_documents > 0, pieces.tokens_of_documents
    cut_M = (documents.lengths - tokens_M)[kept_M]
    packed, parts_M = int(kept_M.sum()), pieces.parts[kept_M]
    return PackingCounts(
        documents=len(documents),
        packed=packed,
        untrained=len(documents) - packed,
        truncated=int(((parts_M == 1) & (cut_M > 0)).sum()),
        split=int((parts_M > 1).sum()),
        pieces=len(pieces.starts),
        cut_tokens=int(cut_M.sum()),
        unpredicted=int(pieces.unpredicted.sum()),
        tokens=int(pieces.lengths.sum()),
        trained_tokens=int(pieces.trained.sum()),
        rows=rows,
        sequence_length=sequence_length,
    )


def _nothing_trained(documents: Documents, sequence_length: int) -> Problem:
    longest = int(documents.lengths.max(initial=0))
    fix = f"The longest has {longest} tokens: raise sequence_length above {sequence_length}"
    what = f"no trained token in {len(documents)} records"
    return Problem(where="data", what=what, fix=fix if longest > sequence_length else "")
