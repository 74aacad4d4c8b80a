"""Signatures of rows: the digest of the normalised text, and a key for each band of its MinHash.

Rows with the key of a band in common are candidates for near duplicates. The keys of a chunk lie in a file of their
own, sealed by a digest over the digests of the texts: a killed run takes up what belongs to its rows, no more.

R = rows, S = slots of a MinHash, K = bands.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from posttrain.disk import naming
from posttrain.prepare.shingles import Flat, Hashes, combine, normalise, shingles

FORMAT = 1
"""Number of the layout of a chunk's file and of the hashes in it."""
CHUNK = 2000
"""Rows signed at once: ten times as many take twice the time each, for want of cache."""
SLOTS = 128
"""Slots of a MinHash."""
SEED = 42
MOST_MISSED = 0.002
"""Share of the pairs just at the threshold that no band may show."""
SEAL_BYTES = 16
DIGEST_BYTES = 16
PACK = struct.Struct(f"={SLOTS}I")


@dataclass(frozen=True)
class Signatures:
    """Signatures of a number of rows; the keys stay in their files, as those of a million rows are 170 MB."""

    digests: Hashes
    """128 bits of each normalised text, as two numbers."""
    files: Sequence[tuple[Path, int]]
    """Files of keys, with the rows of each; a row without words has the key 0."""

    def __len__(self) -> int:
        return len(self.digests)

    def band(self, number: int) -> Hashes:
        """Return the keys of a band for all rows."""
        parts = [np.fromfile(path, "<u8", rows, offset=8 * rows * number) for path, rows in self.files]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Banding:
    """Division of a MinHash into bands."""

    bands: int
    slots: int
    """Slots of a band."""


def banding(threshold: float) -> Banding:
    """Return the longest bands that miss at most MOST_MISSED of the pairs whose similarity is ``threshold``."""
    for slots in range(16, 1, -1):
        bands = SLOTS // slots
        if (1 - threshold**slots) ** bands <= MOST_MISSED:
            return Banding(bands, slots)
    return Banding(SLOTS, 1)


def rechunked(chunks: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    """Yield the rows of chunks of any size in chunks of CHUNK."""
    rows = itertools.chain.from_iterable(chunks)
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


def sign_rows(chunks: Iterable[Sequence[str]], threshold: float, folder: Path) -> Signatures:
    """Return the signatures of all rows, taking over those that a former run left in ``folder``."""
    shape = banding(threshold)
    digests, files = [], []
    for number, chunk in enumerate(rechunked(chunks)):
        texts = [normalise(text) for text in chunk]
        digests_R = b"".join(hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest() for text in texts)
        path = folder / f"signatures-{number:06}.bin"
        if not _is_sound(path, shape, digests_R):
            _write(path, shape, digests_R, _keys(shingles(texts), shape))
        digests.append(np.frombuffer(digests_R, "<u8").reshape(-1, 2))
        files.append((path, len(texts)))
    return Signatures(np.concatenate(digests) if digests else np.empty((0, 2), np.uint64), files)


def _keys(flat: Flat, shape: Banding) -> Hashes:
    """Return the key of each band and row."""
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat.hashes, flat.offsets.astype(np.uint64), SLOTS, SEED)
    packed = b"".join([PACK.pack(*row) for row in matrix.to_rows()])  # a third of np.array's time
    slots_SR = np.frombuffer(packed, np.uint32).reshape(-1, SLOTS).T.astype(np.uint64)
    keys_KR = np.empty((shape.bands, len(flat)), np.uint64)
    for band in range(shape.bands):
        keys_KR[band] = combine([*slots_SR[band * shape.slots : (band + 1) * shape.slots]])
    keys_KR[:, np.diff(flat.offsets) == 0] = 0
    return keys_KR


def _seal(shape: Banding, digests_R: bytes, keys: bytes) -> bytes:
    """Return the digest of all that a chunk's file depends on, and of its content."""
    head = f"{FORMAT} {RMinHash.ALGORITHM_VERSION} {SEED} {shape.bands} {shape.slots} {len(digests_R)}\n".encode()
    return hashlib.blake2b(b"".join((head, digests_R, keys)), digest_size=SEAL_BYTES).digest()


def _is_sound(path: Path, shape: Banding, digests_R: bytes) -> bool:
    """Return True when a chunk's file is there, whole, and the one of these rows."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    keys, seal = content[:-SEAL_BYTES], content[-SEAL_BYTES:]
    return len(keys) == len(digests_R) // DIGEST_BYTES * 8 * shape.bands and seal == _seal(shape, digests_R, keys)


def _write(path: Path, shape: Banding, digests_R: bytes, keys_KR: NDArray[Any]) -> None:
    keys = keys_KR.astype("<u8").tobytes()
    draft = path.with_suffix(".tmp")
    with naming(draft):
        draft.write_bytes(keys + _seal(shape, digests_R, keys))
        os.replace(draft, path)
