"""Rows that say the same in other words, by a static model of word vectors in a local folder (extra ``semantic``).

The vector of a text is the mean of its words' vectors, without their order and negations: what is found is to be read,
and dropped when told. A row is compared with the WINDOW rows before it that stay: time grows with the rows, memory does
not. W = rows of the window, B = rows of a block, D = dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.prepare.rows import batches

WINDOW = 20_000
"""Rows that a row is compared with; with 256 dimensions they take 20 MB, and a block's similarities 40 MB."""
BLOCK = 500
"""Rows that are compared at once."""

Vectors = NDArray[np.float32]


def load(folder: Path) -> Any:
    """Return the model in a folder."""
    from model2vec import StaticModel

    return StaticModel.from_pretrained(folder, force_download=False)


def find_alike(
    texts: Iterable[str], model: Any, threshold: float, families: Sequence[int] | None = None
) -> Iterator[tuple[int, int, float]]:
    """Yield each row that is like one before it that stays, that row, and the cosine of the two.

    Args:
        texts: Texts of the rows, those that stay among equals first.
        model: A static model.
        threshold: Least cosine.
        families: Number of each row's family, whose rows are never compared with each other; negative for none.
    """
    numbers = None if families is None else np.asarray(families)
    window_WD, rows_W = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
    first = 0
    for block in batches(texts, BLOCK):
        vectors_BD = _vectors(block, model)
        if not len(window_WD):
            window_WD = np.zeros((0, vectors_BD.shape[1]), np.float32)
        known_BW = vectors_BD @ window_WD.T
        among_BB = np.tril(vectors_BD @ vectors_BD.T, -1)
        if numbers is not None:
            numbers_B = numbers[first : first + len(block)]
            own_B = (numbers_B >= 0)[:, None]
            known_BW = np.where(own_B & (numbers_B[:, None] == numbers[rows_W]), 0, known_BW)
            among_BB = np.where(own_B & (numbers_B[:, None] == numbers_B), 0, among_BB)
        stays_B = np.zeros(len(block), bool)
        for at in range(len(block)):
            near = int((among_BB[at] * stays_B).argmax())
            similarity, witness = float(among_BB[at, near] * stays_B[near]), first + near
            if len(rows_W) and (far := known_BW[at].max()) >= similarity:
                similarity, witness = float(far), int(rows_W[known_BW[at].argmax()])
            if similarity >= threshold:
                yield first + at, witness, min(similarity, 1.0)
            else:
                stays_B[at] = True
        window_WD = np.concatenate([window_WD, vectors_BD[stays_B]])[-WINDOW:]
        rows_W = np.concatenate([rows_W, first + np.flatnonzero(stays_B)])[-WINDOW:]
        first += len(block)


def _vectors(texts: Sequence[str], model: Any) -> Vectors:
    """Return a vector of length 1 for each text, and 0 for one without known words, which is like no other."""
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    found_BD = np.asarray(model.encode(clean, use_multiprocessing=False, show_progress_bar=False), np.float32)
    lengths_B = np.linalg.norm(found_BD, axis=1, keepdims=True)
    np.divide(found_BD, lengths_B, out=found_BD, where=lengths_B > 0)
    return found_BD
