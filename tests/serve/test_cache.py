"""A lane's cache holds what was written, whatever joined and left; equal prompts are read once."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch.nn import functional as F

from posttrain.model.loading import load_model
from posttrain.serve.ask import Ask, Ended, Event, Sampling, Token
from posttrain.serve.cache import ROOM, RowCache
from posttrain.serve.lane import Lane
from posttrain.serve.mixing import BASE
from tests.support.tiny import base_source, write_base

HEADS, SIZE = 2, 3


def written(cache: RowCache, rows: int, tokens: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Write tokens for all rows into both layers, and return what was written into the second."""
    for layer in range(2):
        new = [torch.randn(rows, HEADS, tokens, size, generator=draw) for size in (SIZE, SIZE + 2)]
        keys, values = cache.update(new[0], new[1], layer)
        assert keys[:, :, -tokens:].equal(new[0])
        assert values[:, :, -tokens:].equal(new[1])
    return new[0], new[1]


def test_it_holds_what_joining_and_cutting_tensors_holds() -> None:
    order, draw = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(40):
        cache = RowCache()
        rows = order.randint(1, 3)
        wanted = list(written(cache, rows, order.randint(1, 9), draw))
        for _ in range(40):
            match order.choice(["write", "write", "select", "trim", "join"]):
                case "write":
                    new = written(cache, len(wanted[0]), order.choice([1, 1, 1, 2, ROOM + 2]), draw)
                    wanted = [torch.cat(pair, dim=2) for pair in zip(wanted, new, strict=True)]
                case "select":
                    places = order.choices(range(len(wanted[0])), k=order.randint(1, 4))
                    cache.select(places)
                    wanted = [each[places] for each in wanted]
                case "trim":
                    cut = order.randint(0, wanted[0].shape[2] - 1)
                    cache.trim(cut)
                    wanted = [each[:, :, cut:] for each in wanted]
                case "join":
                    other = RowCache()
                    new = written(other, order.randint(1, 2), order.randint(1, 30), draw)
                    cache.join(other)
                    width = max(wanted[0].shape[2], new[0].shape[2])
                    wanted = [
                        torch.cat([F.pad(each, (0, 0, width - each.shape[2], 0)) for each in pair])
                        for pair in zip(wanted, new, strict=True)
                    ]
            held = cache.layers[1]
            assert held.keys.equal(wanted[0])
            assert held.values.equal(wanted[1])
            assert cache.get_seq_length() == wanted[0].shape[2]


def test_rows_with_one_prompt_read_it_once(tmp_path: Path) -> None:
    model = load_model(base_source(write_base(tmp_path / "base")), "float32").eval()
    read = []
    model.register_forward_pre_hook(lambda _, args, given: read.append(len(given["input_ids"])), with_kwargs=True)
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [8, 9], [8, 9]]
    found: list[list[Event]] = [[] for _ in prompts]
    asks = [
        Ask(system="one", prompt=prompt, sampling=Sampling(max_tokens=3 + place), ends=frozenset(), send=events.append)
        for place, (prompt, events) in enumerate(zip(prompts, found, strict=True))
    ]
    lane = Lane(model, mixed=False)
    lane.admit([(ask, BASE) for ask in asks])
    while len(lane):
        lane.step()
    assert read == [2, 5, 5, 4, 3, 2, 1]  # rows, with those that ended
    for place, events in enumerate(found):
        tokens = [event.id for event in events if isinstance(event, Token)]
        ids = torch.tensor([prompts[place]])
        alone = model.generate(
            input_ids=ids, max_new_tokens=3 + place, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        assert tokens == alone[0, ids.shape[1] :].tolist()
        assert events[-1] == Ended("length")
