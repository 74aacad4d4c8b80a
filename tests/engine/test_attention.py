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
from posttrain.engine.attention import install, packed_hidden, rehearse
from posttrain.engine.attention_kernels import Documents, Kernel, document_attention
from posttrain.engine.engine import Single
from posttrain.engine.neftune import noisy_embeddings
from posttrain.errors import BadInput
from posttrain.model.targets import text_decoder
from tests.support.architectures import tiny_model
from tests.support.tiny import VOCABULARY, sft_config, tiny_llama

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


# --- Architectures ----------------------------------------------------------------------------------------------------

UNPACKABLE = ("bloom", "falcon_alibi", "llama4_text", "mamba", "qwen3_next")
"""Positions counted from a mask of two dimensions, attention in chunks, or a state from token to token."""


def alone(model: Any, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    parts = [
        text_decoder(model)(input_ids=part, use_cache=False).last_hidden_state[0] for part in ids.split(lengths, 1)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["falcon", "gpt2", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_what_mixes_tokens_by_attention_alone_is_packed(name: str) -> None:
    model = tiny_model(name)
    ids, lengths = random_ids(30), [12, 3, 15]
    with torch.no_grad():
        expected = alone(model, ids, lengths)
        install(model)
        assert relative(packed_hidden(model, ids, lengths), expected) <= 2e-6


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_cannot_be_packed_is_rejected_by_name(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(BadInput, match=f"{type(model).__name__} cannot be packed.*\n.*packing=false"):
        install(model)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_without_packing_each_document_goes_through_the_model_alone(name: str) -> None:
    model = tiny_model(name)
    ids, lengths = random_ids(30), [12, 3, 15]
    expected = alone(model, ids, lengths)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    gradients = {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    assert install(model, packing=False).kernel == kernels.ALONE
    found = packed_hidden(model, ids, lengths)
    assert relative(found.detach(), expected.detach()) <= 1e-6
    (found * weights).sum().backward()
    for key, gradient in gradients.items():
        assert relative(model.get_parameter(key).grad, gradient) <= 1e-5, key


def test_noise_has_the_scale_of_each_document_in_a_model_that_cannot_be_packed() -> None:
    model, ids = tiny_model("bloom"), random_ids(30)
    install(model, packing=False)
    embed, noisy = model.train().get_input_embeddings(), []
    with torch.no_grad():
        clean = embed(ids)
        with noisy_embeddings(model, [20, 10], 5.0):
            embed.register_forward_hook(lambda module, inputs, output: noisy.append(output))
            packed_hidden(model, ids, [20, 10])
    for found, expected in zip(noisy, clean.split([20, 10], 1), strict=True):
        bound = 5.0 / expected.numel() ** 0.5
        assert 0.9 * bound < float((found - expected).abs().max()) <= bound


def test_a_model_that_sees_the_future_is_rejected_without_packing_too() -> None:
    model = tiny_llama().eval()
    mix = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: mix(hidden) + hidden.mean(1, keepdim=True)
    with pytest.raises(BadInput, match="LlamaForCausalLM sees the tokens that it predicts"):
        install(model, packing=False)


def test_logits_that_are_no_product_with_hidden_states_are_rejected() -> None:
    with pytest.raises(BadInput, match="BertLMHeadModel makes its logits from hidden states in a way unknown to sft"):
        install(tiny_model("bert"), packing=False)


def test_a_model_that_needs_more_than_text_is_rejected_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()

    def forward(**inputs: Any) -> Any:
        raise TypeError("missing pixel_values")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(BadInput, match="LlamaForCausalLM cannot be run on text alone: TypeError: missing pixel_values"):
        install(model, packing=False)


def test_a_model_whose_code_cannot_be_trained_is_rejected_before_the_first_step() -> None:
    model = tiny_llama()
    embed = model.model.layers[0].forward

    def in_place(hidden: torch.Tensor, **rest: Any) -> Any:
        return embed(model.model.layers[0].input_layernorm.weight.add_(0.0) * hidden, **rest)

    install(model)
    model.model.layers[0].forward = in_place
    with pytest.raises(BadInput, match="LlamaForCausalLM cannot be trained with these settings: RuntimeError: a leaf"):
        rehearse(model, Single(model, sft_config()).accumulate)


def test_a_rehearsal_leaves_no_trace() -> None:
    model, state = copy.deepcopy(PACKED).train(), torch.get_rng_state()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rehearse(model, Single(model, sft_config()).accumulate)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
