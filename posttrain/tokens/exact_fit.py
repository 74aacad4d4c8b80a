"""Items of different lengths into bins without a gap, for lengths that are much alike."""

# C = lengths from 0 to the capacity, P = pairs of lengths that sum to the same

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def exact_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins: the longest item left, and then what fills the bin without a gap.

    That is one item, or two as equal as can be, which leaves the short ones for the gaps of later bins; where there are
    none, the longest item that fits, and on from there.
    """
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    for index, length in enumerate(lengths):
        waiting[length].append(index)
    left_C = np.array([len(indices) for indices in waiting])
    bins = []
    for length in range(capacity, 0, -1):
        while left_C[length]:
            bins.append([waiting[size].pop() for size in _filled(left_C, length)])
    return bins


def _filled(left_C: Counts, first: int) -> list[int]:
    """The lengths of a bin that begins with ``first``, taken out of ``left_C``, the items left of each length."""
    sizes: list[int] = []
    space, found = len(left_C) - 1, [first]
    while found:
        for size in found:
            left_C[size] -= 1
        sizes += found
        space -= sum(found)
        found = _exactly(left_C, space) or _longest(left_C, space)
    return sizes


def _exactly(left_C: Counts, space: int) -> list[int]:
    """One length that is ``space``, or two that sum to it; empty when there are none."""
    if space and left_C[space]:
        return [space]
    half = space // 2
    pairs_P = np.minimum(left_C[1 : half + 1], left_C[space - half : space][::-1])
    if half and half * 2 == space:
        pairs_P[-1] = left_C[half] // 2
    found = np.flatnonzero(pairs_P)
    return [int(found[-1]) + 1, space - int(found[-1]) - 1] if len(found) else []


def _longest(left_C: Counts, space: int) -> list[int]:
    found = np.flatnonzero(left_C[1 : space + 1])
    return [int(found[-1]) + 1] if len(found) else []
