"""Tiny random models of architectures that differ in attention, experts, layers or parts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny import VOCABULARY

ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**ROPE, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": {**ROPE, "is_decoder": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon_alibi": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "llama4_text": {
        **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "qwen3_next": {
        **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


def tiny_model(name: str, **settings: Any) -> PreTrainedModel:
    """Return a model of the architecture ``name`` in evaluation mode; weights large enough for attention to matter."""
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }
    config = CONFIG_MAPPING[name.removesuffix("_alibi")](**common, **SETTINGS[name], **settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def tiny_gemma3() -> PreTrainedModel:
    """Return a Gemma 3 with a vision tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {**GROUPED, "vocab_size": VOCABULARY, "sliding_window": 8, "query_pre_attn_scalar": 8}
    vision = {**ROPE, "image_size": 16, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=99)
    return Gemma3ForConditionalGeneration(config).eval()
