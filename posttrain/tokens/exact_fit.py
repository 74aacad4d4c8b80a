"""Bins without a gap, for items whose lengths are much alike.

    lengths 5 4 4 3 2 2, capacity 10

    best fit     5 4      4 3 2    2      3 bins
    exact fit    5 2 3    4 2 4           2 bins

Best fit looks at one item at a time and leaves a gap wherever no single item fills it; exact fit also tries pairs.
"""

# N = items, C = lengths from 0 to the capacity, P = pairs of lengths that sum to the same

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from posttrain.tokens.bins import Bins
from posttrain.tokens.table import Indices

Counts = NDArray[np.int64]


def exact_fit(lengths: Sequence[int] | Indices, capacity: int) -> Bins:
    """Return the indices of ``lengths`` in bins, each begun by the longest item left.

    Fill the gap exactly with one item, else with the two most equal; otherwise take the longest fitting item, and
    repeat. Bins of the same lengths are filled at once.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    waiting_N = np.argsort(lengths_N, kind="stable")
    left_C = np.bincount(lengths_N, minlength=capacity + 1)
    ends = np.cumsum(left_C).tolist()
    filled, fillings = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for length in range(capacity, 0, -1):
        while left_C[length]:
            sizes = _fill_bin(left_C, length)
            repeats = 1 + _repeat(left_C, sizes)
            filled.append(_taken(waiting_N, ends, sizes, repeats))
            fillings.append(np.full(repeats, len(sizes)))
    return Bins(np.concatenate(filled), np.cumsum(np.concatenate(fillings)))


def _taken(waiting_N: Indices, ends: list[int], sizes: Sequence[int], repeats: int) -> Indices:
    """Return the items of ``repeats`` bins of these lengths, the last that wait of each length first.

    ``ends`` are the ends of the items of each length, and are moved.
    """
    items = np.empty((repeats, len(sizes)), np.int64)
    for size in set(sizes):
        places = [place for place, each in enumerate(sizes) if each == size]
        end = ends[size]
        ends[size] = begin = end - repeats * len(places)
        items[:, places] = waiting_N[begin:end][::-1].reshape(repeats, len(places))
    return items.ravel()


def _repeat(left_C: Counts, sizes: Sequence[int]) -> int:
    """Return the number of bins that the same lengths fill next; take their items out of ``left_C``.

    A choice depends on which lengths are left, and in the middle pair on two items of one: while two of each remain,
    nothing else is chosen.
    """
    counts = Counter(sizes)
    repeats = max(0, min((int(left_C[size]) - 2) // count for size, count in counts.items()))
    for size, count in counts.items():
        left_C[size] -= repeats * count
    return repeats


def _fill_bin(left_C: Counts, first: int) -> list[int]:
    """Return the lengths of a bin that begins with ``first``; take them out of ``left_C``, the items of each length."""
    sizes: list[int] = []
    space, found = len(left_C) - 1, [first]
    while found:
        for size in found:
            left_C[size] -= 1
        sizes += found
        space -= sum(found)
        found = _find_exact(left_C, space) or _find_longest(left_C, space)
    return sizes


def _find_exact(left_C: Counts, space: int) -> list[int]:
    """Return one length equal to ``space``, or two with that sum; empty when there are none."""
    if space and left_C[space]:
        return [space]
    # The most equal pair: the shortest items stay for the gaps of later bins, where nothing else fits.
    half = space // 2
    pairs_P = np.minimum(left_C[1 : half + 1], left_C[space - half : space][::-1])
    # Both items of the middle pair have the same length, so it needs two of them.
    if half and half * 2 == space:
        pairs_P[-1] = left_C[half] // 2
    found = np.flatnonzero(pairs_P)
    return [int(found[-1]) + 1, space - int(found[-1]) - 1] if len(found) else []


def _find_longest(left_C: Counts, space: int) -> list[int]:
    found = np.flatnonzero(left_C[1 : space + 1])
    return [int(found[-1]) + 1] if len(found) else []
