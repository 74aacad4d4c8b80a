"""Bins that are filled with the longest items first, each into the fullest bin with room for it."""

# N = items, L = different lengths

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from posttrain.tokens.bins import Bins
from posttrain.tokens.table import Indices


def best_fit(lengths: Sequence[int] | Indices, capacity: int) -> Bins:
    """Return the indices of ``lengths`` (1 to ``capacity``) in bins, each item in the fullest bin with room for it.

    Best-fit decreasing needs at most 11/9 of the best number of bins, plus one (Johnson 1973, "Near-optimal bin
    packing algorithms"). An optimal packing is NP-hard. Bins are kept by the space left in them, and items of one
    length go into bins of one space at once.
    """
    shortness_N = -np.asarray(lengths, dtype=np.int64)
    order_N = np.argsort(shortness_N, kind="stable")
    shortness_L, counts_L = np.unique(shortness_N, return_counts=True)
    owners = [np.empty(0, np.int64)]
    bins = 0
    spaces: list[int] = []
    with_space: dict[int, list[int]] = {}
    for length, items in zip((-shortness_L).tolist(), counts_L.tolist(), strict=True):
        while items:
            at = bisect_left(spaces, length)
            space = spaces[at] if at < len(spaces) else capacity
            each = min(space // length, items)  # a bin with room for the next item is the fullest one
            wanted = items // each
            if at == len(spaces):
                numbers = list(range(bins, bins + wanted))
                bins += wanted
            else:
                open_bins = with_space[space]
                numbers = open_bins[: -wanted - 1 : -1]
                del open_bins[-wanted:]
                if not open_bins:
                    del spaces[at]
            owners.append(np.repeat(numbers, each))
            items -= len(numbers) * each
            left = space - length * each
            if not with_space.setdefault(left, []):
                insort(spaces, left)
            with_space[left] += numbers
    return Bins.of(order_N, np.concatenate(owners))
