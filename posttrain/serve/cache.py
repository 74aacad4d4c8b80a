"""The keys and values of a lane's rows: a new token is written into room behind the last one, a new row below the last.

    row 0   x x p p p a a _ _          p = prompt, a = answer so far, x = padding, _ = room
    row 1   p p p p p p a _ _
    room    _ _ _ _ _ _ _ _ _

A row that leaves has its place taken by one of the last. DynamicCache joins the tensors anew with every token, which
copies all tokens of all rows.
"""

# B = rows, H = heads, T = tokens, D = size of a head

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from posttrain.serve.prefixes import Beginning

ROOM = 16
"""Tokens that fit behind the last one after rows have been copied."""
MORE_ROWS = 4
"""Rows for which there is room for one more after they have been copied."""


class RowCache(DynamicCache):
    """The cache of one model, in which rows come and go."""

    def __init__(self) -> None:
        """Begin without rows."""
        super().__init__()
        self.layer_class_to_replicate = RowLayer

    @classmethod
    def of(cls, rows: Sequence[Beginning | None]) -> RowCache:
        """Return a cache whose rows have read these beginnings, at least one of them; the shorter ones are padded."""
        cache = cls()
        some = next(row for row in rows if row is not None)
        width = max(row.tokens for row in rows if row is not None)
        for number in range(len(some.layers)):
            empty = tuple(each[:, :, :0] for each in some.layer(number))
            cache.layers.append(RowLayer.of([empty if row is None else row.layer(number) for row in rows], width))
        return cache

    def row(self, place: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return copies of the last keys and values [1, H, T, D] of a row, of every layer."""
        return [
            (layer.keys[place, None, :, -tokens:].clone(), layer.values[place, None, :, -tokens:].clone())
            for layer in self.layers
        ]

    def select(self, places: Sequence[int]) -> None:
        """Keep the rows at these places, in this order; a place may come twice."""
        places_B = torch.tensor(places)
        for layer in self.layers:
            layer.select(places_B.to(layer.device))

    @torch.inference_mode()
    def drop(self, places: Sequence[int]) -> list[int]:
        """Keep the rows at these places, none twice; return their places in the new order."""
        kept, count = set(places), len(places)
        holes = [place for place in range(count) if place not in kept]
        last = [place for place in places if place >= count]
        order = [*range(count)]
        for hole, place in zip(holes, last, strict=True):
            order[hole] = place
        holes_B, last_B = (torch.tensor(each, dtype=torch.long) for each in (holes, last))
        for layer in self.layers:
            layer.drop(count, holes_B.to(layer.device), last_B.to(layer.device))
        return order

    def trim(self, tokens: int) -> None:
        """Let go of the first tokens of every row."""
        for layer in self.layers:
            layer.trim(tokens)

    @torch.inference_mode()
    def join(self, other: RowCache) -> None:
        """Append the rows of another cache, the shorter rows padded at the beginning."""
        for own, new in zip(self.layers, other.layers, strict=True):
            own.join(new)


class RowLayer(DynamicLayer):
    """The keys and values of one layer of the model."""

    _held: tuple[torch.Tensor, torch.Tensor]
    """Keys and values [B, H, T, D] with what is before the first token, behind the last one and below the last row."""
    _rows = _begin = _end = 0

    @classmethod
    def of(cls, rows: Sequence[tuple[torch.Tensor, ...]], width: int) -> RowLayer:
        """Return the layer whose rows have these keys and values [1, H, T, D], and room for more."""
        layer = cls()
        keys, values = (_stacked(tensors, width, ROOM) for tensors in zip(*rows, strict=True))
        layer.lazy_initialization(keys, values)
        layer._take((keys, values), width, 0, len(rows))
        return layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values [B, H, T, D] of new tokens and return those of all."""
        new = key_states.shape[-2]
        if not self.is_initialized:  # without room: prompts that were read are mostly copied beside others next
            self.lazy_initialization(key_states, value_states)
            return self._take((key_states, value_states), new)
        if self._end + new > self._held[0].shape[-2]:
            self._copy([self], self._end - self._begin, new + ROOM)
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[: self._rows, :, self._end : self._end + new] = states
        return self._take(self._held, self._end + new, self._begin, self._rows)

    def select(self, places_B: torch.Tensor) -> None:
        """Keep the rows at these places."""
        keys, values = (held[:, :, self._begin :].index_select(0, places_B) for held in self._held)
        self._take((keys, values), self._end - self._begin)

    def drop(self, rows: int, holes_B: torch.Tensor, last_B: torch.Tensor) -> None:
        """Keep so many rows, the rows at ``last_B`` in the places ``holes_B`` of others."""
        for held in self._held:
            held[holes_B] = held[last_B]
        self._take(self._held, self._end, self._begin, rows)

    def trim(self, tokens: int) -> None:
        """Let go of the first tokens; their memory goes with the next copy."""
        self._take(self._held, self._end, self._begin + tokens, self._rows)

    def join(self, other: RowLayer) -> None:
        """Append rows, padded to the longer side's tokens."""
        width, new = self._end - self._begin, other._end - other._begin
        rows = self._rows + other._rows
        if new > width or rows > len(self._held[0]):
            self._copy([self, other], max(width, new), ROOM)
            return
        for held, states in zip(self._held, (other.keys, other.values), strict=True):
            held[self._rows : rows, :, self._begin : self._end - new] = 0
            held[self._rows : rows, :, self._end - new : self._end] = states
        self._take(self._held, self._end, self._begin, rows)

    def _copy(self, parts: Sequence[RowLayer], width: int, room: int) -> None:
        """Hold the rows of the parts, ``width`` tokens wide, and room for more."""
        whole = [(part.keys, part.values) for part in parts]
        keys, values = (_stacked(tensors, width, room) for tensors in zip(*whole, strict=True))
        self._take((keys, values), width, 0, sum(part._rows for part in parts))

    def _take(
        self, held: tuple[torch.Tensor, torch.Tensor], end: int, begin: int = 0, rows: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold these keys and values; ``rows`` are the first ones that are not room, by default all."""
        self._held, self._begin, self._end = held, begin, end
        self._rows = len(held[0]) if rows is None else rows
        self.keys, self.values = (each[: self._rows, :, begin:end] for each in held)
        return self.keys, self.values


def _stacked(parts: Sequence[torch.Tensor], width: int, room: int) -> torch.Tensor:
    """Return the rows of all parts [B, H, width + room, D], each at the end of its width, with 0 before it.

    Room for more rows is below them. The padding is masked, and must be finite all the same: no weight of 0 makes a NaN
    vanish.
    """
    some = parts[0]
    count = sum(map(len, parts))
    stacked = some.new_empty((count + count // MORE_ROWS, some.shape[1], width + room, some.shape[3]))
    place = 0
    for part in parts:
        rows, before = stacked[place : place + len(part)], width - part.shape[2]
        rows[..., :before, :] = 0
        rows[..., before:width, :] = part
        place += len(part)
    return stacked
