"""Words and k-grams of texts as flat arrays of 64-bit hashes, equal on every machine and in every process.

A word is a run of ASCII letters, digits and underscores, or of other letters; a character of a script without spaces
is a word of its own. The hash of a word is a polynomial of its bytes, the hash of a k-gram one of its words.

    texts      "Two plus two."    ""    "Yes"
    hashes_W   two plus two             yes
    offsets_R1 0                  3     3      4

R = rows (texts), R1 = R + 1, W = words or k-grams of all rows, B = bytes of a slab.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORDS = 3
"""Words of a shingle."""
CHARACTERS = 5
"""Characters of a shingle in a text without spaces."""
UNSPACED_SHARE = 0.3
"""Share of characters without spaces from which on a text counts as one without."""
SLAB = 1 << 16
"""Bytes hashed at once: the arrays stay in the processor's cache."""

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Japanese, Chinese
)
"""Characters of languages that are written without spaces."""
PUNCTUATION = re.compile(
    "[\u0080-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb-\u00bf\u00d7\u00f7\u2000-\u206f\u20a0-\u20cf"
    "\u2190-\u2bff\u3000-\u303f\ufe00-\ufe6f\uff00-\uff0f\uff1a-\uff20]+"
)
"""Frequent characters beyond ASCII that end a word."""

WORD = re.compile(rb"[0-9A-Za-z_\x80-\xff]+")

SPACES = bytes.maketrans(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f", b"abcdefghijklmnopqrstuvwxyz" + b" " * 9
)
"""ASCII in lower case, each space a blank."""

WORD_BYTES = bytes(byte if byte >= 128 or chr(byte).isalnum() or chr(byte) == "_" else 0 for byte in range(256))
"""Each byte of a word as it is, all others 0."""

Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

BASE = 0x9E3779B97F4A7C15
"""Base of the polynomials; odd, so that it has an inverse modulo 2⁶⁴."""
INVERSE = pow(BASE, -1, 1 << 64)


@dataclass(frozen=True)
class Flat:
    """Hashes of several rows, one after the other: those of row i are ``hashes[offsets[i] : offsets[i + 1]]``."""

    hashes: Hashes
    offsets: Offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, row: int) -> Hashes:
        """Return the hashes of a row."""
        return self.hashes[self.offsets[row] : self.offsets[row + 1]]


def normalise(text: str) -> bytes:
    """Return a text in lower case with single blanks for spaces: texts that differ in no more are exact duplicates."""
    if not text.isascii():
        return " ".join(text.lower().split()).encode("utf-8", "surrogatepass")
    found = text.encode().translate(SPACES)
    while b"  " in found:
        found = found.replace(b"  ", b" ")
    return found.strip()


def is_unspaced(text: bytes) -> bool:
    """Return True for a normalised text most of which has no spaces between words."""
    if text.isascii():
        return False
    characters = text.decode("utf-8", "surrogatepass")
    return len(UNSPACED.findall(characters)) > UNSPACED_SHARE * len(characters)


def words(texts: Sequence[bytes]) -> Flat:
    """Return the hashes of the words of normalised texts."""
    spaced = [text if text.isascii() else _space(text) for text in texts]
    parts, counts = [], np.zeros(len(texts), np.int64)
    scratch_B = np.empty(SLAB + 1, np.uint64)  # used again and again: fresh memory takes longer than the hashing
    first = 0
    while first < len(spaced):
        last, size = first + 1, len(spaced[first])
        while last < len(spaced) and (size := size + 1 + len(spaced[last])) <= SLAB:
            last += 1
        found, counts[first:last] = _hash_words(spaced[first:last], scratch_B)
        parts.append(found)
        first = last
    return Flat(np.concatenate(parts) if parts else np.empty(0, np.uint64), _offsets(counts))


def spell(text: bytes) -> list[str]:
    """Return the words of a normalised text as they are written."""
    return [word.decode("utf-8", "replace") for word in WORD.findall(_space(text))]


def shingles(texts: Sequence[bytes]) -> Flat:
    """Return the hashes of the shingles of normalised texts: 3 words, or 5 characters of a text without spaces.

    A text shorter than a shingle is one shingle; a text without words has none. A shingle may come twice.
    """
    flat = words(texts)
    unspaced_R = np.array([is_unspaced(text) for text in texts], bool)
    if not unspaced_R.any():
        return k_grams(flat, WORDS)
    if unspaced_R.all():
        return k_grams(flat, CHARACTERS)
    by_words, by_characters = k_grams(flat, WORDS), k_grams(flat, CHARACTERS)
    rows = [(by_characters if unspaced else by_words).row(row) for row, unspaced in enumerate(unspaced_R)]
    return Flat(np.concatenate(rows), _offsets(np.array([len(row) for row in rows], np.int64)))


def k_grams(flat: Flat, k: int, *, whole: bool = True) -> Flat:
    """Return the hashes of the runs of ``k`` words in each row.

    Args:
        flat: Words.
        k: Words of a run.
        whole: Make one run of all words of a row with fewer; else it has none.
    """
    starts_R, lengths_R = flat.offsets[:-1], np.diff(flat.offsets)
    short_R = (lengths_R < k) & (lengths_R > 0)
    grams_W = _runs(flat.hashes, k)
    keep_W = np.ones(len(flat.hashes), bool)
    for back in range(1, k):  # the last k - 1 words of a row begin no run
        at_R = flat.offsets[1:] - back
        keep_W[at_R[lengths_R >= back]] = False
    if whole and short_R.any():
        keep_W[starts_R[short_R]] = True
        for length in range(1, k):
            rows = starts_R[lengths_R == length]
            grams_W[rows] = combine([flat.hashes[rows + step] for step in range(length)])
    counts_R = np.where(lengths_R >= k, lengths_R - k + 1, short_R if whole else 0)
    return Flat(grams_W[keep_W], _offsets(counts_R))


def combine(terms: Sequence[Hashes]) -> Hashes:
    """Return one hash for each tuple of hashes that lie at the same place of the terms."""
    total = terms[0] + np.uint64(len(terms))
    for term in terms[1:]:
        total *= np.uint64(BASE)
        total += term
    return _mix(total)


def _runs(hashes_W: Hashes, k: int) -> Hashes:
    """Return ``combine`` of the ``k`` hashes from each one on, and of those left at the end."""
    total_W = hashes_W + np.uint64(k)
    for step in range(1, k):
        total_W *= np.uint64(BASE)
        total_W[:-step] += hashes_W[step:]
    return _mix(total_W)


def _space(text: bytes) -> bytes:
    """Return a text with blanks for punctuation beyond ASCII, and around characters that are words of their own."""
    characters = PUNCTUATION.sub(" ", text.decode("utf-8", "surrogatepass"))
    return UNSPACED.sub(r" \g<0> ", characters).encode("utf-8", "surrogatepass")


def _hash_words(texts: Sequence[bytes], scratch_B: Hashes) -> tuple[Hashes, Offsets]:
    """Return the hashes of the words of texts that fit a slab, or of one that does not, and the words of each text."""
    if len(texts) == 1 and len(texts[0]) > SLAB:
        found = _hash_long(texts[0], scratch_B)
        return found, np.array([len(found)], np.int64)
    bytes_B = np.frombuffer((b" ".join(texts) + b" ").translate(WORD_BYTES), np.uint8)
    hashes_W, starts_W = _hash_slab(bytes_B, scratch_B)
    sizes_R = np.array([len(text) + 1 for text in texts], np.int64)
    return hashes_W, np.diff(np.searchsorted(starts_W, _offsets(sizes_R)))


def _hash_long(text: bytes, scratch_B: Hashes) -> Hashes:
    """Return the hashes of the words of one text longer than a slab; a word that is longer is cut."""
    parts, first = [], 0
    while first < len(text):
        bytes_B = np.frombuffer(text[first : first + SLAB].translate(WORD_BYTES), np.uint8)
        if first + len(bytes_B) < len(text) and len(ends := np.flatnonzero(bytes_B[-SLAB // 2 :] == 0)):
            bytes_B = bytes_B[: len(bytes_B) - SLAB // 2 + ends[-1] + 1]
        parts.append(_hash_slab(bytes_B, scratch_B)[0])
        first += len(bytes_B)
    return np.concatenate(parts)


def _hash_slab(bytes_B: NDArray[np.uint8], scratch_B: Hashes) -> tuple[Hashes, Offsets]:
    """Return the hash and the place of each word, a run of bytes that are not 0."""
    powers_B, inverses_B = _powers()
    inside_B = bytes_B != 0
    begins_B = inside_B.copy()
    begins_B[1:] &= ~inside_B[:-1]
    starts_W = np.flatnonzero(begins_B)
    if not len(starts_W):
        return np.empty(0, np.uint64), starts_W
    terms_B = scratch_B[: len(bytes_B)]
    terms_B[:] = bytes_B
    terms_B *= powers_B[: len(bytes_B)]
    sums_W = np.add.reduceat(terms_B, starts_W)
    sums_W *= inverses_B[starts_W]
    return _mix(sums_W), starts_W


def _mix(values: Hashes) -> Hashes:
    """Mix values in place as splitmix64 does: every bit of the result depends on every bit of the value."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _offsets(counts: NDArray[Any]) -> Offsets:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """Return the powers of the base and those of its inverse, one for each byte of a slab."""
    size = SLAB + 1
    powers, inverses = np.ones(size, np.uint64), np.ones(size, np.uint64)
    powers[1:], inverses[1:] = BASE, INVERSE
    return np.cumprod(powers), np.cumprod(inverses)
