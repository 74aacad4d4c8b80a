"""Items in bins, as two flat arrays.

    bins      [4 0] [2] [1 3 5]
    order     4 0 2 1 3 5
    ends      2 3 6

A million items in lists of a few each take seconds to make, and the collector of garbage walks through all of them.
"""

# N = items, R = bins

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from posttrain.tokens.table import Indices


@dataclass(frozen=True, slots=True, eq=False)
class Bins(Sequence[list[int]]):
    """The indices of items, bin by bin."""

    order: Indices
    """Indices of all items, one bin after the other, [N]."""
    ends: Indices
    """The end of each bin in ``order``, [R]."""

    @classmethod
    def of(cls, order_N: Indices, owners_N: Indices) -> Bins:
        """Return items in the bins with the numbers ``owners_N``, from 0 and without a gap; each bin in this order."""
        return cls(order_N[np.argsort(owners_N, kind="stable")], np.cumsum(np.bincount(owners_N)))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        items: list[int] = self.items(range(len(self))[index]).tolist()
        return items

    def items(self, number: int) -> Indices:
        """Return the items of a bin."""
        return self.order[self.ends[number - 1] if number else 0 : self.ends[number]]
