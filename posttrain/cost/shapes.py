"""The shapes of a model's weights, from its configuration alone: for a model whose files are not on this machine.

The names are those that transformers gives the weights in memory.
"""

# A = width of all query heads, D = width, E = experts, H = width of a head, I = width of the MLP or of one expert,
# K = width of all key heads, V = vocabulary

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]
NORMS = ("input_layernorm", "post_attention_layernorm")
NORMS_AROUND = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True, kw_only=True)
class Family:
    """The features in which the layers of one architecture differ from Llama's."""

    tied: bool = False
    """True when embeddings and output projection are one matrix, unless the configuration says otherwise."""
    head: int | None = None
    """Width of a head where the configuration names none; by default the width divided among the heads."""
    biased: tuple[str, ...] = ()
    """Projections of attention that have a bias, whatever the configuration says."""
    normed: str = ""
    """Norms on queries and keys: of each ``head``, of all heads together (``all``), or none."""
    norms: tuple[str, ...] = NORMS
    """Norms of a layer."""
    fused: bool = False
    """True when queries, keys and values are one matrix, and so are the MLP's gate and its input."""
    experts: str = ""
    """Experts in place of the MLP: in the form of ``qwen``, of ``gpt_oss``, or none."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "smollm3": Family(tied=True),
    "qwen2": Family(biased=("q_proj", "k_proj", "v_proj")),
    "qwen3": Family(normed="head", head=128),
    "qwen3_moe": Family(normed="head", experts="qwen"),
    "gemma3_text": Family(normed="head", norms=NORMS_AROUND, tied=True, head=256),
    "phi3": Family(fused=True),
    "olmo2": Family(normed="all", norms=("post_attention_layernorm", "post_feedforward_layernorm")),
    "gpt_oss": Family(biased=("q_proj", "k_proj", "v_proj", "o_proj"), experts="gpt_oss", head=64),
}
"""Architectures by ``model_type``."""


def config_shapes(config: Mapping[str, Any]) -> Shapes | None:
    """Return the shapes of all weights by name; None for an architecture that is not in ``FAMILIES``."""
    family = FAMILIES.get(str(config.get("model_type")))
    try:
        return None if family is None else dict(_weights(family, config))
    except (KeyError, TypeError):  # a size is missing, or is no number
        return None


def _weights(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from ((f"{prefix}.self_attn.{name}", shape) for name, shape in _attention(family, config))
        yield from ((f"{prefix}.mlp.{name}", shape) for name, shape in _mlp(family, config, layer))
        yield from ((f"{prefix}.{name}.weight", (width,)) for name in family.norms)
    yield "model.norm.weight", (width,)
    if not config.get("tie_word_embeddings", family.tied):
        yield "lm_head.weight", (vocabulary, width)


def _attention(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or family.head or width // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    shapes = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, queries)}
    if family.fused:
        shapes = {"qkv_proj": (queries + 2 * keys, width), "o_proj": (width, queries)}
    for name, shape in shapes.items():
        yield f"{name}.weight", shape
        if name in family.biased or (config.get("attention_bias") and not family.fused):
            yield f"{name}.bias", shape[:1]
    if family.normed:
        each = family.normed == "head"
        yield "q_norm.weight", (head if each else queries,)
        yield "k_norm.weight", (head if each else keys,)
    if family.experts == "gpt_oss":
        yield "sinks", (heads,)


def _mlp(family: Family, config: Mapping[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    sparse = (layer + 1) % config.get("decoder_sparse_step", 1) == 0 and layer not in config.get("mlp_only_layers", ())
    if family.experts == "gpt_oss":
        experts = config["num_local_experts"]
        yield from {
            "router.weight": (experts, width), "router.bias": (experts,),
            "experts.gate_up_proj": (experts, width, 2 * inner), "experts.gate_up_proj_bias": (experts, 2 * inner),
            "experts.down_proj": (experts, inner, width), "experts.down_proj_bias": (experts, width),
        }.items()  # fmt: skip
    elif family.experts == "qwen" and sparse:
        experts, inner = config.get("num_experts", 128), config["moe_intermediate_size"]
        yield "gate.weight", (experts, width)
        yield "experts.gate_up_proj", (experts, 2 * inner, width)
        yield "experts.down_proj", (experts, width, inner)
    else:
        first = {"gate_proj": (inner, width), "up_proj": (inner, width)}
        if family.fused:
            first = {"gate_up_proj": (2 * inner, width)}
        for name, shape in (first | {"down_proj": (width, inner)}).items():
            yield f"{name}.weight", shape
            if config.get("mlp_bias"):
                yield f"{name}.bias", shape[:1]
