"""The weights that an adapter reaches: every linear map of the language model, or a count of what is left out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from peft import PeftModel

from posttrain.config.schema import LoraSettings
from posttrain.errors import BadInput
from posttrain.model.loading import new_adapter
from posttrain.model.targets import Reach, measure_reach, reach_faults, reach_note, resolve_targets
from tests.support.architectures import tiny_gemma3, tiny_model

MAPS = ("linear layers", "experts", "routers")


def adapter(model: Any, *targets: str, **settings: Any) -> PeftModel:
    return new_adapter(model, LoraSettings(r=2, alpha=4, target_modules=list(targets) or "all-linear", **settings), 0)


def reach(model: Any) -> dict[str, Reach]:
    return {each.kind: each for each in measure_reach(model)}


def adapted(model: PeftModel) -> set[str]:
    """Names of the adapted modules."""
    return {name.partition(".lora_A")[0] for name, _ in model.get_base_model().named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize(
    "name", ["bloom", "falcon", "gpt2", "gpt_oss", "llama4_text", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next"]
)
def test_all_linear_is_every_linear_map_of_the_language_model(name: str) -> None:
    found = reach(adapter(tiny_model(name)))
    for kind in set(MAPS) & found.keys():
        assert found[kind].trained_matrices == found[kind].matrices, kind
        assert found[kind].trained_weights == found[kind].weights, kind
    assert found["embeddings"].trained_weights == 0
    assert not reach_faults(list(found.values()), "all-linear")


def test_experts_are_matrices_of_their_own_and_the_counts_are_right() -> None:
    model = tiny_model("gpt_oss")
    found = reach(adapter(model))
    assert (found["experts"].matrices, found["experts"].weights) == (2 * 2 * 4, 2 * 4 * (32 * 96 + 48 * 32))
    assert (found["routers"].matrices, found["routers"].weights) == (2, 2 * 4 * 32)
    assert (found["linear layers"].matrices, found["embeddings"].matrices) == (8, 2)
    assert "experts 16 of 16, linear layers 8 of 8" in reach_note(list(found.values()))
    assert asdict(found["experts"])["four_bit_weights"] == 0


def test_every_adapted_map_gets_a_gradient_from_text_and_nothing_else_is_adapted() -> None:
    model = adapter(tiny_gemma3())
    ids = torch.arange(20)[None]
    model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits.square().sum().backward()
    found = reach(model)
    assert found["linear layers"].trained_matrices == found["linear layers"].matrices == 14
    assert found["outside the language model"].trained_matrices == 0
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_B" in name)


def test_mamba_keeps_the_layers_that_peft_gives_no_adapter_and_says_so() -> None:
    found = list(reach(adapter(tiny_model("mamba"))).values())
    (fault,) = reach_faults(found, "all-linear")
    assert "peft adapts not 2 of 8 linear layers" in fault
    with pytest.raises(BadInput, match="out_proj of MambaForCausalLM takes no adapter"):
        adapter(tiny_model("mamba"), "in_proj", "out_proj")


@pytest.mark.parametrize(
    ("name", "targets", "ends"),
    [
        ("gpt2", ["c_attn", "c_proj"], {"c_attn", "attn.c_proj", "mlp.c_proj"}),
        ("gpt2", ["attn.c_proj"], {"attn.c_proj"}),
        ("gpt2", ["transformer.h.1.mlp.c_fc"], {"transformer.h.1.mlp.c_fc"}),
        ("gpt_oss", ["q_proj", "down_proj"], {"q_proj", "mlp.experts"}),
        ("llama4_text", ["router", "q_proj"], {"router", "q_proj"}),
        ("gpt_oss", ["experts.gate_up_proj"], {"mlp.experts"}),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"], {"q_proj", "mlp.experts", "experts.base_layer"}),
        ("qwen2_moe", ["shared_expert.down_proj"], {"shared_expert.down_proj"}),
    ],
)
def test_layers_and_experts_are_found_by_name_and_by_its_end(name: str, targets: list[str], ends: set[str]) -> None:
    found = adapted(adapter(tiny_model(name), *targets))
    assert found
    assert all(any(module.endswith(end) for end in ends) for module in found), found
    assert all(any(module.endswith(end) for module in found) for end in ends), found


def test_the_names_of_gpt2s_layers_give_the_sums_of_all_linear() -> None:
    named = reach(adapter(tiny_model("gpt2"), "c_attn", "c_proj", "c_fc"))
    assert named == reach(adapter(tiny_model("gpt2")))


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("gpt2", ["c_atn"], r"no linear layer of the model is called c_atn\n.*Did you mean c_attn"),
        ("qwen3_moe", ["gate_proj"], "gate_proj"),
        ("gpt2", ["lm_head"], "lm_head is the output projection"),
    ],
)
def test_names_that_are_no_targets_are_rejected_with_the_options(name: str, targets: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        adapter(tiny_model(name), *targets)


def test_a_layer_that_text_never_enters_is_rejected() -> None:
    with pytest.raises(BadInput, match="fc1 is outside the language model"):
        adapter(tiny_gemma3(), "q_proj", "fc1")
    assert resolve_targets(tiny_gemma3(), LoraSettings(target_modules=["q_proj"])).modules == [
        f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)
    ]


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"dora": True}])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_settings_that_experts_cannot_have_are_rejected(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"{next(iter(settings))}: the experts of .* are bare parameters"):
        adapter(tiny_model(name), **settings)


def test_four_bits_that_leave_out_experts_are_named_with_their_share() -> None:
    four_bit = Reach(kind="linear layers", matrices=8, weights=100, four_bit_weights=100)
    (fault,) = reach_faults([four_bit, Reach(kind="experts", matrices=64, weights=900)], "all-linear")[1:]
    assert fault.startswith("4 bits hold 10.0% of the weights: experts (90.0%) keep 16 or more")
    assert not reach_faults([four_bit], ["q_proj"])
