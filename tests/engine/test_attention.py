"""Packed documents are isolated: each computes what it computes alone, and nothing of its neighbours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

from posttrain.engine import attention_kernels as kernels
from posttrain.engine.attention import install, packed_hidden
from posttrain.engine.attention_kernels import Documents, Kernel, document_attention
from posttrain.errors import BadInput
from tests.support.tiny import VOCABULARY, tiny_llama

MODEL = tiny_llama().eval()
PACKED = copy.deepcopy(MODEL)
install(PACKED)


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_packed_hidden_states_equal_each_document_alone(lengths: list[int]) -> None:
    ids = random_ids(sum(lengths))
    with torch.no_grad():
        packed = packed_hidden(PACKED, ids, lengths)
        alone = [MODEL.model(input_ids=part, use_cache=False).last_hidden_state[0] for part in ids.split(lengths, 1)]
    assert relative(packed, torch.cat(alone)) <= 1e-6


def test_gradients_equal_each_document_alone() -> None:
    lengths, ids = [5, 11, 1, 8], random_ids(25)
    weights = torch.randn(25, 32, generator=torch.Generator().manual_seed(1))
    packed, alone = copy.deepcopy(PACKED), copy.deepcopy(MODEL)
    (packed_hidden(packed, ids, lengths) * weights).sum().backward()
    for part, weight in zip(ids.split(lengths, 1), weights.split(lengths), strict=True):
        (alone.model(input_ids=part, use_cache=False).last_hidden_state[0] * weight).sum().backward()
    for (name, actual), expected in zip(packed.model.named_parameters(), alone.model.parameters(), strict=True):
        assert relative(actual.grad, expected.grad) <= 2e-6, name


def test_changing_one_document_changes_no_bit_of_another() -> None:
    first, second = random_ids(9, seed=1), random_ids(9, seed=2)
    neighbour = random_ids(7, seed=3)
    with torch.no_grad():
        before = packed_hidden(PACKED, torch.cat([first, neighbour], 1), [9, 7])[9:]
        after = packed_hidden(PACKED, torch.cat([second, neighbour], 1), [9, 7])[9:]
    assert torch.equal(before, after)


def test_a_leak_between_documents_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(*inputs: Any, documents: Documents, **rest: Any) -> Any:
        return document_attention(*inputs, documents=Documents.of([sum(documents.lengths)], inputs[1].device), **rest)

    AttentionInterface.register("leaking", leaking)
    leak = Kernel(name="leaking", summary="a leak", obstacle=lambda causal: "")
    monkeypatch.setattr(kernels, "KERNELS", (leak,))
    with pytest.raises(BadInput, match="computes packed documents differently"):
        install(copy.deepcopy(MODEL))


def test_a_sliding_window_is_honoured() -> None:
    torch.manual_seed(0)
    settings = {**tiny_llama().config.to_dict(), "sliding_window": 4}
    model = MistralForCausalLM(MistralConfig(**{k: v for k, v in settings.items() if k != "model_type"})).eval()
    ids, lengths = random_ids(30), [12, 3, 15]
    with torch.no_grad():
        alone = [model.model(input_ids=part, use_cache=False).last_hidden_state[0] for part in ids.split(lengths, 1)]
        install(model)
        packed = packed_hidden(model, ids, lengths)
    assert relative(packed, torch.cat(alone)) <= 1e-6


def test_installing_keeps_the_training_mode() -> None:
    model = copy.deepcopy(MODEL).train()
    install(model)
    assert model.training
    assert model.config._attn_implementation == "posttrain_documents"
