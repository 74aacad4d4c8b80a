"""Beginnings of texts that a lane has read or written, with their keys and values: nobody reads them again.

A chat's next turn begins with all turns before it; many prompts begin with one system prompt, or are asked twice. The
texts least lately used make room for others. Keys and values depend on the adapter, so each has texts of its own.
"""

# H = heads, T = tokens, D = size of a head

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

MOST_TOKENS = 8192
"""Most tokens of all texts of a lane."""
LEAST_TOKENS = 16
"""Fewest tokens for which a beginning is taken, unless it is all that there is to read."""

Ids = tuple[int, ...]
Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [1, H, T, D] of one layer."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """The first tokens of a text."""

    layers: Sequence[Layer]
    tokens: int
    """So many of them are meant."""

    def layer(self, number: int) -> Layer:
        """Return the keys and values [1, H, T, D] of one layer."""
        keys, values = self.layers[number]
        return keys[:, :, : self.tokens], values[:, :, : self.tokens]


class Prefixes:
    """The texts of a lane."""

    def __init__(self, most: int = MOST_TOKENS) -> None:
        """Begin without texts."""
        self._most = most
        self._texts: OrderedDict[tuple[str, Ids], Sequence[Layer]] = OrderedDict()

    def find(self, adapter: str, prompt: Sequence[int]) -> Beginning | None:
        """Return the longest known beginning of a prompt, without its last token, which is always read."""
        wanted = tuple(prompt[:-1])
        lengths = {ids: _common(ids, wanted) for ids in self._of(adapter)}
        best = max(lengths, key=lengths.__getitem__, default=())
        tokens = lengths.get(best, 0)
        if not tokens or tokens < min(LEAST_TOKENS, len(wanted)):
            return None
        self._texts.move_to_end((adapter, best))
        return Beginning(self._texts[adapter, best], tokens)

    def holds(self, adapter: str, ids: Ids) -> bool:
        """Return True when a text begins with these tokens."""
        return any(known[: len(ids)] == ids for known in self._of(adapter))

    def keep(self, adapter: str, ids: Ids, layers: Sequence[Layer]) -> None:
        """Keep a text, unless it is longer than all texts may be, in place of those that it begins with."""
        if len(ids) > self._most:
            return
        for known in [known for known in self._of(adapter) if ids[: len(known)] == known]:
            del self._texts[adapter, known]
        self._texts[adapter, ids] = layers
        while sum(len(known) for _, known in self._texts) > self._most:
            self._texts.popitem(last=False)

    def _of(self, adapter: str) -> Iterator[Ids]:
        return (ids for name, ids in self._texts if name == adapter)


def _common(one: Ids, other: Ids) -> int:
    """Return the number of tokens with which both begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
