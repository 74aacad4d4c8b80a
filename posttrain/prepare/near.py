"""Duplicate rows, exact and near: each that goes has a witness that stays.

Two rows are exact duplicates when they differ in case and spaces alone, and near duplicates when the Jaccard similarity
of their shingles reaches a threshold. MinHash finds the candidates, and the similarity of each is computed exactly::

    pass 1   digest of the text, MinHash, key of each band     signatures.py, files of 2,000 rows
             rows of one digest: the best stays
             rows with the key of a band in common: a group
    pass 2   shingles of the rows in groups, in one flat file
             greedy, the best row first: a row goes when one that stays in its groups is as similar as the threshold

Not the connected components of the pairs: where A is like B and B like C, C stays unless A, which stays, is like it.
"""

# R = rows, P = pairs of them

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from posttrain.disk import read_at
from posttrain.prepare.shingles import Hashes, normalise, shingles
from posttrain.prepare.signatures import Signatures, banding, rechunked, sign_rows

RELATED = 0.5
"""Similarity from which rows that were compared are of one cluster, whatever the threshold."""
BINS = 20
"""Bins of the histogram of similarities, from 0 to 1."""
MOST_OF_GROUP = 256
"""Staying rows of a group that a later row may be compared with."""
MOST_COMPARED = 32
"""Rows that one row is compared with, those first that have most bands in common with it."""
OPERATORS = "+/=<>^%&|~×÷−±≤≥≠√"
"""Signs that tell two problems of the same words apart."""
NO_OPERATORS = bytes(byte for byte in range(256) if byte >= 128 or chr(byte) not in OPERATORS)
SIGNS = re.compile(rb"(?<![a-z_])[-*](?= ?\d)")
"""A minus or a times before a number, and no hyphen or star of a word."""
BEYOND_ASCII = re.compile("[×÷−±≤≥≠√]")

Places = NDArray[np.intp]
Chunks = Callable[[], Iterable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row that goes."""

    row: int
    witness: int
    """The row like it that stays."""
    kind: Literal["exact", "near"]
    similarity: float
    """Jaccard similarity of their shingles; 1 for an exact one."""


class Duplicates(tuple[Duplicate, ...]):
    """The rows that go, in their order."""

    similarities: NDArray[np.int64]
    """Pairs that were compared, counted by similarity in BINS bins of the same width; those below the threshold too."""
    clusters: NDArray[np.int32]
    """For each row the first of its cluster: rows that copies and similarities of RELATED or more connect."""


def find_duplicates(
    chunks: Chunks,
    *,
    threshold: float = 0.8,
    folder: Path | None = None,
    quality: Sequence[float] | None = None,
    families: Sequence[int] | None = None,
) -> Duplicates:
    """Return the rows that are duplicates of rows that stay.

    Args:
        chunks: The texts of all rows, in chunks of any size; called twice, with the same rows each time.
        threshold: Jaccard similarity of near duplicates.
        folder: Folder for the signatures, from which a killed run resumes. A temporary one by default.
        quality: Quality of each row: the better one stays, the first of equals.
        families: Number of each row's family, whose rows are never copies of each other; negative for none.
    """
    with _place(folder) as place:
        signed = sign_rows(chunks(), threshold, place)
        count, bands = len(signed), banding(threshold).bands
        ranks_R = _ranks(count, quality)
        leaders_R = _leaders(signed.digests, ranks_R)
        groups = _groups(signed, bands, leaders_R, ranks_R)
        sets = _ShingleSets(chunks(), groups.rows, place, count)
        try:
            near, similarities, related = _decide(groups, sets, threshold, families)
        finally:
            sets.close()
    found = Duplicates(_duplicates(leaders_R, near, families))
    found.similarities = similarities
    found.clusters = _firsts(leaders_R, related)
    return found


@contextlib.contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="posttrain-shingles-") as name:
            yield Path(name)


def _ranks(count: int, quality: Sequence[float] | None) -> NDArray[np.int32]:
    """Return the rank of each row, 0 for the best."""
    ranks_R = np.arange(count, dtype=np.int32)
    if quality is not None:
        ranks_R[np.argsort(-np.asarray(quality, float), kind="stable")] = np.arange(count)
    return ranks_R


def _leaders(digests: Hashes, ranks_R: NDArray[np.int32]) -> Places:
    """Return for each row the best of the rows with its text."""
    order = np.lexsort((ranks_R, digests[:, 1], digests[:, 0]))
    sorted_R2 = digests[order]
    first = np.ones(len(order), bool)
    first[1:] = (sorted_R2[1:] != sorted_R2[:-1]).any(axis=1)
    leaders_R = np.empty_like(order)
    leaders_R[order] = order[np.flatnonzero(first)[np.cumsum(first) - 1]] if len(order) else order
    return leaders_R


@dataclass(frozen=True)
class _Groups:
    """Rows with a key in common: for each row, the best first, the groups that it is in."""

    rows: Places
    offsets: Places
    """Groups of row i of ``rows``: ``members[offsets[i] : offsets[i + 1]]``."""
    members: NDArray[np.int32]
    count: int


def _groups(signed: Signatures, bands: int, leaders_R: Places, ranks_R: NDArray[np.int32]) -> _Groups:
    alive = np.flatnonzero(leaders_R == np.arange(len(leaders_R)))
    rows, members, count = [], [], 0
    for band in range(bands if len(alive) else 0):
        keys = signed.band(band)[alive]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        same = (keys[1:] == keys[:-1]) & (keys[1:] != 0)
        inside = np.zeros(len(keys), bool)
        inside[1:] |= same
        inside[:-1] |= same
        begins = inside.copy()
        begins[1:] &= ~same
        rows.append(alive[order][inside].astype(np.int32))
        members.append((np.cumsum(begins)[inside] - 1 + count).astype(np.int32))
        count += int(begins.sum())
    if not count:
        return _Groups(np.empty(0, np.intp), np.zeros(1, np.intp), np.empty(0, np.int32), 0)
    rows_E, members_E = np.concatenate(rows), np.concatenate(members)
    order = np.argsort(ranks_R[rows_E], kind="stable")
    rows_E, members_E = rows_E[order], members_E[order]
    starts = np.flatnonzero(np.r_[True, rows_E[1:] != rows_E[:-1]])
    return _Groups(rows_E[starts].astype(np.intp), np.r_[starts, len(rows_E)], members_E, count)


class _ShingleSets:
    """Sorted sets of shingles of some rows, in a file: those of a million rows are half a gigabyte."""

    def __init__(self, chunks: Iterable[Sequence[str]], rows: Places, place: Path, count: int) -> None:
        self._path = place / "shingles.tmp"
        self._index_R = np.full(count, -1, np.int32)
        self._index_R[rows] = 0
        self._offsets = array("q", [0])
        self._operators = array("q")
        """Digest of the operators of each row."""
        first = 0
        with self._path.open("wb") as stream:
            for chunk in rechunked(chunks) if len(rows) else ():
                wanted = np.flatnonzero(self._index_R[first : first + len(chunk)] >= 0)
                if len(wanted):
                    self._index_R[first + wanted] = np.arange(len(wanted)) + len(self._operators)
                    self._append(stream, [normalise(chunk[number]) for number in wanted])
                first += len(chunk)
        self._file = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def _append(self, stream: Any, texts: Sequence[bytes]) -> None:
        flat = shingles(texts)
        for number, text in enumerate(texts):
            ordered = np.sort(flat.row(number))
            new = ordered[1:] != ordered[:-1]
            distinct = ordered if new.all() else ordered[np.concatenate(([True], new))]
            stream.write(distinct.data)
            self._offsets.append(self._offsets[-1] + len(distinct))
            signs = _operators(text)
            self._operators.append(int.from_bytes(blake2b(signs, digest_size=7).digest()))

    def similarity(self, row: int, other: int) -> float:
        """Return the Jaccard similarity of two rows; below 1 when the same words have other operators between them."""
        first, second = self._index_R[row], self._index_R[other]
        merged = np.concatenate((self._set(first), self._set(second)))
        merged.sort()
        shared = int(np.count_nonzero(merged[1:] == merged[:-1]))
        union = len(merged) - shared
        if shared == union and self._operators[first] != self._operators[second]:
            return 0.0
        return shared / union

    def _set(self, index: int) -> Hashes:
        first, last = self._offsets[index], self._offsets[index + 1]
        return np.frombuffer(read_at(self._file, 8 * (last - first), 8 * first), np.uint64)

    def close(self) -> None:
        """Remove the file."""
        os.close(self._file)
        self._path.unlink(missing_ok=True)


def _operators(text: bytes) -> bytes:
    """Return the operators of a normalised text."""
    found = text.translate(None, NO_OPERATORS)
    if b"-" in text or b"*" in text:
        found += b"".join(SIGNS.findall(text))
    return found if text.isascii() else found + "".join(BEYOND_ASCII.findall(text.decode("utf-8", "replace"))).encode()


def _decide(
    groups: _Groups, sets: _ShingleSets, threshold: float, families: Sequence[int] | None
) -> tuple[dict[int, tuple[int, float]], NDArray[np.int64], array[int]]:
    """Return the witness and the similarity of each near duplicate, the histogram of all pairs, and the related ones.

    Those are rows in twos, one after another.
    """
    related = array("i")
    staying = _Staying(groups.count)
    near: dict[int, tuple[int, float]] = {}
    histogram = np.zeros(BINS, np.int64)
    for number, row in enumerate(groups.rows.tolist()):
        members = groups.members[groups.offsets[number] : groups.offsets[number + 1]]
        for other in staying.like(members):
            if _related(row, other, families):
                continue
            similarity = sets.similarity(row, other)
            histogram[min(int(similarity * BINS), BINS - 1)] += 1
            if similarity >= min(RELATED, threshold):
                related.extend((row, other))
            if similarity >= threshold:
                near[row] = (other, similarity)
                break
        else:
            staying.add(row, members)
    return near, histogram, related


def _firsts(leaders_R: Places, related: array[int]) -> NDArray[np.int32]:
    """Return for each row the first of those that copies and ``related`` pairs connect it with, itself without any."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, pairs_P2 = len(leaders_R), np.array(related, np.int32).reshape(-1, 2)
    starts = np.concatenate([np.arange(count), pairs_P2[:, 0]])
    ends = np.concatenate([leaders_R, pairs_P2[:, 1]])
    graph = coo_array((np.ones(len(starts), bool), (starts, ends)), shape=(count, count))
    _, numbers_R = connected_components(graph, directed=False)
    firsts_R: NDArray[np.int32] = np.unique(numbers_R, return_index=True)[1][numbers_R].astype(np.int32)
    return firsts_R


class _Staying:
    """Rows that stay, by group: the first of each in an array, further ones in lists."""

    def __init__(self, groups: int) -> None:
        self._first = np.full(groups, -1, np.int32)
        self._further: dict[int, list[int]] = {}

    def like(self, members: NDArray[np.int32]) -> list[int]:
        """Return the rows that stay in the groups, those in most of them first, the best first among equals."""
        counts = Counter(self._first[members].tolist())
        counts.pop(-1, None)
        if not counts:
            return []
        if self._further:
            for member in members.tolist():
                counts.update(self._further.get(member, ()))
        return [row for row, _ in counts.most_common(MOST_COMPARED)]

    def add(self, row: int, members: NDArray[np.int32]) -> None:
        """Let a row stay."""
        free = self._first[members] < 0
        self._first[members[free]] = row
        for member in members[~free].tolist():
            further = self._further.setdefault(member, [])
            if len(further) < MOST_OF_GROUP:
                further.append(row)


def _related(row: int, other: int, families: Sequence[int] | None) -> bool:
    return families is not None and families[row] == families[other] >= 0


def _duplicates(
    leaders_R: Places, near: dict[int, tuple[int, float]], families: Sequence[int] | None
) -> Iterator[Duplicate]:
    copies = np.flatnonzero(leaders_R != np.arange(len(leaders_R)))
    for row in sorted({*copies.tolist(), *near}):
        leader = int(leaders_R[row])
        if leader in near:  # of a copy, too: its own leader goes
            witness, similarity = near[leader]
            found = Duplicate(row, witness, "near", similarity)
        else:
            found = Duplicate(row, leader, "exact", 1.0)
        if not _related(row, found.witness, families):
            yield found
