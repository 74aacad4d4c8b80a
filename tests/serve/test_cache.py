"""A lane's cache holds what was written, whatever joined and left; what a prompt begins with is read once."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from posttrain.model.loading import load_model
from posttrain.serve.ask import Ask, Ended, Event, Sampling, Token
from posttrain.serve.cache import ROOM, RowCache
from posttrain.serve.lane import Lane
from posttrain.serve.mixing import BASE
from posttrain.serve.prefixes import Prefixes
from tests.support.architectures import tiny_model
from tests.support.tiny import base_source, tiny_llama, write_base

HEADS, SIZE = 2, 3


def written(cache: RowCache, rows: int, tokens: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Write tokens for all rows into both layers, and return what was written into the second."""
    for layer in range(2):
        new = [torch.randn(rows, HEADS, tokens, size, generator=draw) for size in (SIZE, SIZE + 2)]
        keys, values = cache.update(new[0], new[1], layer)
        assert keys[:, :, -tokens:].equal(new[0])
        assert values[:, :, -tokens:].equal(new[1])
    return new[0], new[1]


@torch.inference_mode()
def test_it_holds_what_joining_and_cutting_tensors_holds() -> None:
    order, draw = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(40):
        cache = RowCache()
        rows = order.randint(1, 3)
        wanted = list(written(cache, rows, order.randint(1, 9), draw))
        for _ in range(40):
            match order.choice(["write", "write", "select", "drop", "trim", "join", "join"]):
                case "write":
                    new = written(cache, len(wanted[0]), order.choice([1, 1, 1, 2, ROOM + 2]), draw)
                    wanted = [torch.cat(pair, dim=2) for pair in zip(wanted, new, strict=True)]
                case "select":
                    places = order.choices(range(len(wanted[0])), k=order.randint(1, 4))
                    cache.select(places)
                    wanted = [each[places] for each in wanted]
                case "drop":
                    places = sorted(order.sample(range(len(wanted[0])), order.randint(1, len(wanted[0]))))
                    kept = cache.drop(places)
                    assert sorted(kept) == places
                    wanted = [each[kept] for each in wanted]
                case "trim":
                    cut = order.randint(0, wanted[0].shape[2] - 1)
                    cache.trim(cut)
                    wanted = [each[:, :, cut:] for each in wanted]
                case "join":
                    other = RowCache()
                    new = written(other, order.randint(1, 3), order.choice([1, 2, 3, order.randint(1, 30)]), draw)
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


class Conversation:
    """A lane beside the model alone."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lane = Lane(self.model, mixed=False)
        self.read: list[tuple[int, int]] = []
        """Rows and tokens of each pass over more than one token."""
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, args: Any, given: Mapping[str, Any]) -> None:
        rows, tokens = given["input_ids"].shape
        if tokens > 1:
            self.read.append((rows, tokens))

    def answers(self, *prompts: Sequence[int], tokens: int = 8) -> list[list[int]]:
        """Return the answers of the lane, which are those of the model alone."""
        found: list[list[Event]] = [[] for _ in prompts]
        sampling = Sampling(max_tokens=tokens)
        self.lane.admit([
            (Ask(system="one", prompt=[*ids], sampling=sampling, ends=frozenset(), send=events.append), BASE)
            for ids, events in zip(prompts, found, strict=True)
        ])  # fmt: skip
        while len(self.lane):
            self.lane.step()
        read = [*self.read]
        answers = [[event.id for event in events if isinstance(event, Token)] for events in found]
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt]])
            alone = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                pad_token_id=0, eos_token_id=-1,
            )  # fmt: skip
            assert answer == alone[0, len(prompt) :].tolist()
        self.read = read
        return answers


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon", "gpt2", "mixtral"])
def test_a_turn_reads_what_is_new_alone(name: str) -> None:
    lane = Conversation(tiny_llama() if name == "llama" else tiny_model(name))
    first, second = [*range(5, 35)], [*range(40, 75)]
    one, two = lane.answers(first, second)
    assert lane.read.pop() == (2, 35)
    turns = [*first, *one, 90, 91, 92], [*second, *two, 93], [7, 8, 9, 10]
    lane.answers(*turns[:2])
    assert lane.read.pop() == (2, 4), "the last answer's last token, and the three after it"
    lane.answers(*turns)
    assert lane.read.pop() == (1, 4), "what is known but for its last token is not read"
    lane.answers([*turns[0], 5, 6], [*range(70, 95)], turns[1])
    assert lane.read.pop() == (2, 25), "two of three, from the same number of tokens before their end"
    lane.answers([*first[:20], 99, 98], [*first[:3], 97, 96])
    assert lane.read == [(2, 5)], "a few tokens in common are read again"


def test_texts_of_one_adapter_are_never_anothers_and_the_least_used_go() -> None:
    layers = [(torch.zeros(1, 1, 40, 2), torch.zeros(1, 1, 40, 2))]
    texts = Prefixes(most=100)
    one, two = tuple(range(40)), (*range(39), 99)
    texts.keep("one", one, layers)
    assert texts.find("other", one) is None
    texts.keep("one", two, layers)
    texts.find("one", (*one, 5))  # used later than the other one
    texts.keep("other", one, layers)
    found = [texts.holds(*each) for each in (("one", one), ("one", two), ("other", one))]
    assert found == [True, False, True]
    texts.keep("one", tuple(range(101)), layers)
    assert not texts.holds("one", tuple(range(101))), "longer than all texts may be"
    longer = (*one, *range(50, 60))
    texts.keep("one", longer, layers)
    assert texts.holds("one", one), "as the beginning of another"
    assert texts.holds("other", one), "which took its place"


def test_what_was_not_finite_is_read_again() -> None:
    lane = Conversation(tiny_llama())
    found: list[Event] = []
    ask = Ask(
        system="one", prompt=[*range(5, 30)], sampling=Sampling(max_tokens=4), ends=frozenset(), send=found.append
    )
    lane.lane.admit([(ask, BASE)])
    with torch.no_grad():
        kept = lane.model.model.norm.weight.clone()
        lane.model.model.norm.weight.fill_(torch.nan)
        lane.lane.step()
        lane.model.model.norm.weight.copy_(kept)
    assert isinstance(found[-1], Ended)
    assert found[-1].reason == "failed"
    lane.read.clear()
    lane.answers(range(5, 30))
    assert lane.read == [(1, 25)]
