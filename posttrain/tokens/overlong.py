"""Documents longer than a row: cut at the end, split into pieces, or rejected.

row of 5 slots     truncate    a b c d e
a b c d e f g h    split       a b c d e | f g h      f is not trained: no token of its row predicts it
"""

# M = documents, P = pieces of all documents

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posttrain.config.schema import Overlong
from posttrain.errors import BadInput, Problem
from posttrain.tokens.table import Documents, Indices

NAMED = 5
"""Overlong documents named by the error; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The pieces of documents that a row takes, those without a trained token left out, with counts of the rest."""

    documents: Documents
    starts: Indices
    """The first token of each piece in the table, [P]."""
    lengths: Indices
    """Tokens of each piece, [P]."""
    trained: Indices
    """Trained tokens of each piece, [P]; its first one, which no token predicts, is none of them."""
    owners: Indices
    """The document of each piece, [P]."""
    parts: Indices
    """Pieces of each document, those without a trained token included, [M]."""
    unpredicted: Indices
    """Trained tokens of each document without a prediction, since they begin a piece, [M]."""

    @property
    def tokens_of_documents(self) -> Indices:
        """Tokens in the pieces of each document, [M]."""
        return self._summed(self.lengths)

    @property
    def trained_of_documents(self) -> Indices:
        """Trained tokens in the pieces of each document, [M]."""
        return self._summed(self.trained)

    @property
    def pieces_of_documents(self) -> Indices:
        """Number of pieces with a trained token of each document, [M]."""
        return np.bincount(self.owners, minlength=len(self.documents))

    def _summed(self, values: Indices) -> Indices:
        return np.bincount(self.owners, values, len(self.documents)).astype(np.int64)


def cut(documents: Documents, sequence_length: int, overlong: Overlong) -> Pieces:
    """Return the documents in pieces of at most ``sequence_length`` tokens.

    Truncating keeps the head. Splitting gives full pieces and a shorter last one: no token is lost or doubled. A piece
    does not see the one before it, so its first token is not trained, like the first token of a text.
    """
    whole_M, mask = documents.lengths, documents.table.mask
    kept_M = whole_M if overlong is Overlong.split else np.minimum(whole_M, sequence_length)
    parts_M = -(-kept_M // sequence_length)
    owners_P = np.repeat(np.arange(len(documents)), parts_M)
    numbers_P = np.arange(len(owners_P)) - (np.cumsum(parts_M) - parts_M)[owners_P]
    starts_P = documents.starts[owners_P] + numbers_P * sequence_length
    lengths_P = np.minimum(kept_M[owners_P] - numbers_P * sequence_length, sequence_length)
    trained_P = documents.column("trained")[owners_P].astype(np.int64)
    for place in np.flatnonzero(whole_M[owners_P] > sequence_length).tolist():
        trained_P[place] = mask[starts_P[place] + 1 : starts_P[place] + lengths_P[place]].sum()
    used_P = trained_P > 0
    borders = numbers_P > 0
    lost_M = np.bincount(owners_P[borders], mask[starts_P[borders]], len(documents)).astype(np.int64)
    used_M = np.bincount(owners_P[used_P], minlength=len(documents)) > 0
    return Pieces(
        documents=documents,
        starts=starts_P[used_P],
        lengths=lengths_P[used_P],
        trained=trained_P[used_P],
        owners=owners_P[used_P],
        parts=parts_M,
        unpredicted=lost_M * used_M,
    )


def check_lengths(documents: Documents, sequence_length: int) -> None:
    """Raise BadInput for documents longer than a row; names the first few, counts all."""
    lengths_M = documents.lengths
    overlong = np.flatnonzero(lengths_M > sequence_length)
    if len(overlong):
        raise BadInput(list(_problems(documents, lengths_M, overlong, sequence_length)))


def _problems(
    documents: Documents, lengths_M: Indices, overlong: NDArray[np.intp], sequence_length: int
) -> Iterator[Problem]:
    for place in overlong[:NAMED].tolist():
        what = f"has {lengths_M[place]:,} tokens, a row takes {sequence_length:,}"
        yield Problem(where=documents.where(place), what=what)
    longest = lengths_M.max()
    yield Problem(
        where="overlong=reject",
        what=f"{len(overlong):,} of {len(documents):,} records are longer than {sequence_length:,} tokens",
        fix=f"Raise sequence_length (the longest has {longest:,} tokens), or set overlong to truncate or split",
    )
