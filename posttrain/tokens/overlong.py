"""Documents longer than a row: cut at the end, split into pieces, or rejected.

row of 5 slots     truncate    a b c d e
a b c d e f g h    split       a b c d e | f g h      f is not trained: no token of its row predicts it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posttrain.config.schema import Overlong
from posttrain.errors import BadInput, Problem
from posttrain.tokens.chat import Rendered

NAMED = 5
"""Overlong documents named by the error; the others are counted."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A document or a part of one, short enough for a row; ``ids`` and ``mask`` are equally long."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """True for a trained token; never for the first, which no token predicts."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The pieces of one document, with counts of the rest."""

    pieces: tuple[Piece, ...]
    """The pieces with a trained token."""
    parts: int
    """All pieces of the document, those without a trained token included."""
    cut: int
    """Tokens in no piece."""
    unpredicted: int
    """Trained tokens without a prediction, since they begin a piece of a split document."""

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def trained(self) -> int:
        """Trained tokens of all pieces."""
        return sum(int(piece.mask.sum()) for piece in self.pieces)


def fit(document: Rendered, sequence_length: int, overlong: Overlong) -> Fitted:
    """Return the document in pieces of at most ``sequence_length`` tokens.

    Truncating keeps the head. Splitting gives full pieces and a shorter last one: no token is lost or doubled. A piece
    does not see the one before it, so its first token is not trained, like the first token of a text.
    """
    kept = document.ids if overlong is Overlong.split else document.ids[:sequence_length]
    parts = [_piece(document, start, sequence_length) for start in range(0, len(kept), sequence_length)]
    pieces = tuple(part for part in parts if part.mask.any())
    borders = range(sequence_length, len(kept), sequence_length)
    return Fitted(
        pieces=pieces,
        parts=len(parts),
        cut=len(document.ids) - sum(len(piece.ids) for piece in pieces),
        unpredicted=sum(document.mask[border] for border in borders) if pieces else 0,
    )


def check_lengths(documents: Sequence[Rendered], sequence_length: int) -> None:
    """Raise BadInput for documents longer than a row; names the first few, counts all."""
    overlong = [document for document in documents if len(document.ids) > sequence_length]
    if overlong:
        raise BadInput(list(_problems(overlong, len(documents), sequence_length)))


def _piece(document: Rendered, start: int, sequence_length: int) -> Piece:
    end = start + sequence_length
    mask = np.array(document.mask[start:end], dtype=np.bool_)
    mask[:1] = False
    return Piece(np.fromiter(document.ids[start:end], dtype=np.int32), mask)


def _problems(overlong: Sequence[Rendered], total: int, sequence_length: int) -> Iterator[Problem]:
    for document in overlong[:NAMED]:
        yield Problem(where=document.where, what=f"has {len(document.ids):,} tokens, a row takes {sequence_length:,}")
    longest = max(len(document.ids) for document in overlong)
    yield Problem(
        where="overlong=reject",
        what=f"{len(overlong):,} of {total:,} records are longer than {sequence_length:,} tokens",
        fix=f"Raise sequence_length (the longest has {longest:,} tokens), or set overlong to truncate or split",
    )
