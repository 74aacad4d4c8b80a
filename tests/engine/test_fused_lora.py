"""Fused LoRA layers compute what peft's own do, and leave alone what they do not cover."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear

from posttrain.engine import fused
from posttrain.engine.fused import fuse, is_fused, is_plain, lora_forward, unfuse
from tests.support.tiny import VOCABULARY, tiny_llama


@pytest.fixture(autouse=True)
def lora_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of transformers round to float32 whatever they are given, which would hide what these tests compare."""
    monkeypatch.setattr(fused, "FUSED", ((is_plain, lora_forward),))


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    """A model with an adapter whose B is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **settings})
    model = get_peft_model(tiny_llama(**({"attention_bias": True} if settings.get("use_rslora") else {})), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def run(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of two rows, and the gradients of a loss on them."""
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    return output.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def fused_layers(model: PeftModel) -> set[bool]:
    """Whether LoRA layers are fused: all, none, or some."""
    return {is_fused(module) for module in model.modules() if isinstance(module, Linear)}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_outputs_and_gradients_are_pefts(settings: dict[str, Any], dtype: torch.dtype, limit: float) -> None:
    plain = adapted(dtype, **settings)
    quick = copy.deepcopy(plain)
    fuse(quick)
    assert fused_layers(quick) == {True}
    (logits, gradients), (expected_logits, expected) = run(quick), run(plain)
    assert float(((logits - expected_logits).norm() / expected_logits.norm()).detach()) <= limit
    assert gradients.keys() == expected.keys()
    for name, wanted in expected.items():
        assert float((gradients[name] - wanted).norm() / wanted.norm()) <= limit, name


def test_in_bfloat16_the_adapters_gradients_stay_float32_and_close() -> None:
    exact = adapted(torch.float64)
    mixed = adapted(torch.bfloat16)
    for name, parameter in mixed.named_parameters():
        if "lora" in name:
            parameter.data = dict(exact.named_parameters())[name].data.float()
    fuse(mixed)
    (_, gradients), (_, expected) = run(mixed), run(exact)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - expected[name]).norm() / expected[name].norm()) <= 0.1, name


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_keeps_pefts_way(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    fuse(model)
    assert fused_layers(model) == {False}


def test_switched_off_and_merged_adapters_compute_as_pefts() -> None:
    model = adapted()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        fuse(model)
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        assert torch.equal(off, adapted().unload()(input_ids=ids).logits)
        assert torch.allclose(model.merge_and_unload()(input_ids=ids).logits, expected)


def test_fused_layers_travel_to_other_processes() -> None:
    model = adapted()
    fuse(model)
    copied = pickle.loads(pickle.dumps(model))
    assert fused_layers(copied) == {True}
    assert torch.equal(run(copied)[0], run(model)[0])


def test_unfused_layers_are_pefts_again() -> None:
    model = adapted()
    fuse(model)
    unfuse(model)
    assert fused_layers(model) == {False}
    assert not [module for module in model.modules() if is_fused(module)]
