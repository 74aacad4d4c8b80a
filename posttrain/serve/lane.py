"""A lane: one model and the answers that it is making, all of them a token further with every step.

Rows have different lengths and join at any token. They share one cache of keys and values, padded on the left:

    row 0   . . . p p p a a a a        p = prompt, a = answer so far, . = padding, masked
    row 1   p p p p p p p p p a
    row 2   . . . . . . . . p p        has just joined

A lane whose model carries several adapters gives each row its own one, in the same forward pass. What the beginning of
a prompt has in common with an earlier text of its adapter is not read again.
"""

# B = rows, T = tokens in the cache, S = tokens that are read, V = vocabulary

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F

from posttrain.serve.ask import Ask, Ended, Event
from posttrain.serve.cache import RowCache
from posttrain.serve.drawing import draw, generator_of
from posttrain.serve.mixing import Mixer
from posttrain.serve.prefixes import Beginning, Prefixes


@dataclass(eq=False)
class Row:
    """An answer in the making."""

    ask: Ask
    adapter: str
    """Name of the adapter in a mixed batch, or BASE."""
    left: int
    """Tokens that may still come."""
    generator: torch.Generator | None
    ids: list[int]
    """Tokens of prompt and answer; the newest is not in the cache yet."""
    sound: bool = True
    """False once its logits were not finite."""


class Lane:
    """The rows of one model."""

    def __init__(self, model: Any, *, mixed: bool) -> None:
        """Take a model in evaluation mode; a ``mixed`` one gets the adapter of each row, another is asked as it is."""
        self._mixed = mixed
        self.carry(model)
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        self._known = frozenset(inspect.signature(causal.forward).parameters)
        self._rows: list[Row] = []
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long)
        self._cache, self._prefixes = RowCache(), Prefixes()

    def __len__(self) -> int:
        return len(self._rows)

    def carry(self, model: Any) -> None:
        """Take the model with other adapters; the rows go on."""
        self.model = model
        self._mixer = Mixer(model) if self._mixed and isinstance(model, PeftModel) else None

    @property
    def width(self) -> int:
        """Tokens of each row in the cache, with padding."""
        return self._mask_BT.shape[1]

    @property
    def systems(self) -> set[str]:
        """Digests of the models whose answers it is making."""
        return {row.ask.system for row in self._rows}

    def admit(self, asks: Sequence[tuple[Ask, str]]) -> None:
        """Take in new rows, each with its adapter's name; read their prompts and send their first tokens.

        A prompt that several rows have with one adapter, as the ``n`` answers of a request do, is read once. One that
        is known but for its last token joins unread: the next step reads it.
        """
        rows = [
            Row(ask, adapter, ask.sampling.max_tokens, generator_of(ask.sampling), [*ask.prompt])
            for ask, adapter in asks
        ]
        known = [self._prefixes.find(row.adapter, row.ids) for row in rows]
        whole = [each is not None and each.tokens == len(row.ids) - 1 for row, each in zip(rows, known, strict=True)]
        if unread := [(row, each) for row, each, ready in zip(rows, known, whole, strict=True) if not ready]:
            self._read(*map(list, zip(*unread, strict=True)))
        if ready := [(row, each) for row, each, ready in zip(rows, known, whole, strict=True) if ready]:
            beginnings = [each for _, each in ready]
            self._join([row for row, _ in ready], _mask(beginnings), RowCache.of(beginnings))

    def _read(self, rows: list[Row], known: list[Beginning | None]) -> None:
        """Read prompts, all from the same number of tokens before their end, so that no padding is within a row."""
        places: dict[tuple[str, tuple[int, ...]], int] = {}
        sources = [places.setdefault((row.adapter, tuple(row.ids)), len(places)) for row in rows]
        read = [sources.index(place) for place in range(len(places))]
        longest = max(len(rows[place].ids) - _tokens(known[place]) for place in read)
        beginnings = [_first(known[place], len(rows[place].ids) - longest) for place in read]
        cache = RowCache.of(beginnings) if any(beginnings) else RowCache()
        ids_BS = torch.zeros(len(read), longest, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for at, place in enumerate(read):
            new = rows[place].ids[-longest:]
            ids_BS[at, longest - len(new) :] = torch.tensor(new)
            mask_BS[at, longest - len(new) :] = 1
        mask_BT = torch.cat([_mask(beginnings), mask_BS], dim=1)
        positions_BS = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -longest:]
        logits_BV = self._forward([rows[place] for place in read], ids_BS, mask_BT, positions_BS, cache)
        kept = self._send(rows, logits_BV[sources])
        if kept:
            origins = [sources[place] for place in kept]
            if origins != list(range(len(read))):
                cache.select(origins)
            self._join([rows[place] for place in kept], mask_BT[origins], cache)

    def step(self) -> None:
        """Send the next token of every row, and let go of those that end or are cancelled."""
        going = [place for place, row in enumerate(self._rows) if not row.ask.cancelled]
        self._remember(going, [len(row.ids) - 1 for row in self._rows])
        if not self._keep(going):
            return
        ids_B1 = torch.tensor([[row.ids[-1]] for row in self._rows])
        positions_B1 = torch.tensor([[len(row.ids) - 1] for row in self._rows])
        self._mask_BT = F.pad(self._mask_BT, (0, 1), value=1)
        rows, read = self._rows, [len(row.ids) for row in self._rows]
        logits_BV = self._forward(rows, ids_B1, self._mask_BT, positions_B1, self._cache)
        going = self._send(rows, logits_BV)
        self._remember(going, read)
        self._keep(going)

    def _remember(self, going: Sequence[int], read: Sequence[int]) -> None:
        """Keep the texts of the rows that do not go on, as far as they are ``read`` into the cache."""
        if self._cache.get_seq_length() != self.width:  # the model keeps what it has read in another way
            return
        for place in set(range(len(self._rows))).difference(going):
            row, tokens = self._rows[place], read[place]
            ids = tuple(row.ids[:tokens])
            if row.sound and not self._prefixes.holds(row.adapter, ids):
                self._prefixes.keep(row.adapter, ids, self._cache.row(place, tokens))

    def fail(self, fault: str) -> None:
        """End every answer of the lane."""
        rows, self._rows = self._rows, []
        self._keep([])
        for row in rows:
            row.ask.send(Ended("failed", fault))

    def _forward(
        self,
        rows: Sequence[Row],
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: RowCache,
    ) -> torch.Tensor:
        options: dict[str, Any] = {"position_ids": positions_BT, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self._known}
        device = self.model.device
        moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
        ids_BT = ids_BT.to(device)
        with torch.inference_mode(), self._routed(rows, ids_BT) as model:
            logits_BTV: torch.Tensor = model(
                input_ids=ids_BT, attention_mask=mask_BT.to(device), past_key_values=cache, use_cache=True, **moved
            ).logits
        return logits_BTV[:, -1]

    def _routed(self, rows: Sequence[Row], ids_BT: torch.Tensor) -> AbstractContextManager[Any]:
        """Return the context of a pass, which gives what to call."""
        if self._mixer is None:
            return nullcontext(self.model)
        return self._mixer.routed([row.adapter for row in rows], ids_BT)

    def _send(self, rows: Sequence[Row], logits_BV: torch.Tensor) -> list[int]:
        """Send each row its next token or its end; return the places of the rows that go on."""
        tokens = draw(logits_BV, [row.ask.sampling for row in rows], [row.generator for row in rows])
        going = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            events: list[Event] = []
            if token is None:
                row.sound = False
                events.append(Ended("failed", "the model's logits are not finite"))
            elif token.id in row.ask.ends:
                events.append(Ended("stop"))
            else:
                row.ids.append(token.id)
                row.left -= 1
                events += [token] if row.left else [token, Ended("length")]
                going += [place] if row.left else []
            for event in events:
                row.ask.send(event)
        return going

    def _keep(self, places: list[int]) -> bool:
        """Keep the rows at ``places``, without the columns that only others needed; return True when some are left."""
        if len(places) < len(self._rows) or not places:
            if not places:
                self._rows, self._mask_BT, self._cache = [], torch.zeros(0, 0, dtype=torch.long), RowCache()
                return False
            order = self._cache.drop(places)
            self._rows, self._mask_BT = [self._rows[place] for place in order], self._mask_BT[order]
            self._trim()
        return True

    def _trim(self) -> None:
        padding = int((self._mask_BT.cumsum(-1) == 0).all(0).sum())
        if padding:
            self._mask_BT = self._mask_BT[:, padding:]
            self._cache.trim(padding)

    def _join(self, rows: list[Row], mask_BT: torch.Tensor, cache: RowCache) -> None:
        if not self._rows:
            self._rows, self._mask_BT, self._cache = rows, mask_BT, cache
            self._trim()
            return
        self._rows += rows
        width = max(self._mask_BT.shape[1], mask_BT.shape[1])
        masks = (F.pad(each, (width - each.shape[1], 0)) for each in (self._mask_BT, mask_BT))
        self._mask_BT = torch.cat([*masks])
        self._cache.join(cache)
        self._trim()


def _tokens(beginning: Beginning | None) -> int:
    """Return the number of tokens that need not be read."""
    return 0 if beginning is None else beginning.tokens


def _first(beginning: Beginning | None, tokens: int) -> Beginning | None:
    """Return the first tokens of a beginning; None for no token."""
    return None if beginning is None or tokens <= 0 else replace(beginning, tokens=tokens)


def _mask(beginnings: Sequence[Beginning | None]) -> torch.Tensor:
    """Return the mask [B, T] of beginnings, padded on the left."""
    lengths_B1 = torch.tensor([[_tokens(each)] for each in beginnings])
    width = int(lengths_B1.max())
    return (torch.arange(width) >= width - lengths_B1).long()
