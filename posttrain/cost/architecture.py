"""The sizes of a model that memory depends on, from its config.json and the headers of its weights."""

# D = width, E = experts

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from posttrain.config.paths import shipped
from posttrain.cost.shapes import config_shapes
from posttrain.errors import BadInput
from posttrain.model.base import WEIGHTS, WEIGHTS_INDEX, stored_kind, stored_shapes
from posttrain.model.trust import read_json

LINEAR, EXPERTS, EMBEDDINGS = "linear layers", "experts", "embeddings"
NAMES = {
    "width": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim"),
}
"""Keys of config.json for a size, by the names of the field's architectures."""
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of config.json for the number of experts."""
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
"""Keys of config.json for the number of key heads."""
GATED = ("gelu_new", "gelu", "relu")
"""Activations of MLPs with two matrices; the others have a third, the gate."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a decoder."""

    width: int
    layers: int
    inner: int
    """Width of the MLP; of the experts that a token passes, together, where there are any."""
    queries: int
    """Width of all query heads."""
    keys: int
    """Width of all key heads, and of all value heads."""
    vocabulary: int
    gated: bool
    """True when the MLP has a gate."""
    matrices: Mapping[str, tuple[int, ...]]
    """Shapes of the layers' matrices by name, experts among them."""
    active: int
    """Weights of the layers' matrices that one token passes: of experts, those that it is sent to."""
    windows: tuple[int | None, ...]
    """Tokens that a token sees at most in each layer with attention; None for all before it."""
    cached: int
    """Numbers that each of these layers keeps of a token while an answer is written: its keys and values, or what MLA
    makes both of."""
    state: int
    """Numbers that the layers without attention keep of an answer, however long it is."""
    quantisable: int
    """Weights in linear layers, which bitsandbytes stores in 4 bits."""
    ends: int
    """Weights of embeddings and output projection as they are in memory, tied ones counted once."""
    total: int
    """All weights."""

    @property
    def per_layer(self) -> int:
        """Weights of one layer, with its share of what is not in a layer's matrices nor at the ends."""
        return (self.total - self.ends) // self.layers

    def cache(self, tokens: int) -> int:
        """Return the numbers that are kept of an answer with its prompt, of so many tokens, while it is written."""
        return self.cached * sum(min(tokens, window or tokens) for window in self.windows) + self.state

    def adapter(self, rank: int, targets: str | Sequence[str], *, dora: bool = False) -> int:
        """Return the weights of an adapter of ``rank`` on ``targets``: ``all-linear``, or names of modules."""
        found = [*self.matrices.values()]
        if not isinstance(targets, str):
            ends = tuple(f".{target}{end}" for target in targets for end in ("", ".weight"))
            found = [shape for name, shape in self.matrices.items() if f".{name}".endswith(ends)]
        factors = sum(prod(shape[:-2]) * rank * (shape[-2] + shape[-1]) for shape in found)
        return factors + (sum(prod(shape[:-1]) for shape in found) if dora else 0)


def find_architecture(path: str) -> Architecture | None:
    """Return the sizes of a folder's model, or of a hub's in its cache or in conf/architectures.yaml; None for others.

    Nothing is copied, and a damaged model has no sizes: a run says what is wrong with it.
    """
    local = Path(path).expanduser()
    try:
        if (folder := local if local.is_dir() else _cached(path)) is not None:
            return read_architecture(folder)
        config = _published().get(path)
        return None if config is None else _from_config(config)
    except BadInput:
        return None


def read_architecture(folder: Path) -> Architecture | None:
    """Return the sizes of the model in ``folder``; None when its configuration does not tell them.

    Without weights beside it, the configuration tells those of the architectures in ``shapes.FAMILIES``.
    Raises BadInput when its files are damaged.
    """
    config = read_json(folder / "config.json")
    if (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file():
        return architecture_of(config, stored_shapes(folder))
    return _from_config(config)


def _from_config(config: Mapping[str, Any]) -> Architecture | None:
    inner = config.get("text_config")
    shapes = config_shapes(inner if isinstance(inner, dict) else config)
    return None if shapes is None else architecture_of(config, shapes)


def _cached(name: str) -> Path | None:
    """Return the newest copy of a hub's repository in the cache of its client, of which the configuration is there."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    folder = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}" / "snapshots"
    if name.count("/") > 1 or ".." in name or not folder.is_dir():
        return None
    found = [each for each in folder.iterdir() if (each / "config.json").is_file()]
    return max(found, key=lambda each: each.stat().st_mtime, default=None)


@cache
def _published() -> Mapping[str, Mapping[str, Any]]:
    """Return the configurations of conf/architectures.yaml, with the kind of every layer where some slide."""
    import yaml

    table = yaml.safe_load((shipped("conf") / "architectures.yaml").read_text(encoding="utf-8"))
    return {name: _with_kinds(config) for name, config in table.items()}


def _with_kinds(config: Mapping[str, Any]) -> Mapping[str, Any]:
    every = config.get("sliding_every")
    if not every:
        return config
    numbers = range(1, config["num_hidden_layers"] + 1)
    return {**config, "layer_types": [f"{'sliding' if each % every else 'full'}_attention" for each in numbers]}


def architecture_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """Return the sizes of a model with the given configuration and shapes of weights; None when they do not tell."""
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    kinds = {name: stored_kind(name) for name, shape in shapes.items() if len(shape) >= 2 and not name.endswith("bias")}
    embeddings = {name: shapes[name] for name, kind in kinds.items() if kind == EMBEDDINGS}
    width, layers, heads = (_size(text, name) for name in ("width", "layers", "heads"))
    if not (width and layers and heads and embeddings):
        return None
    head = text.get("head_dim") or width // heads
    keys = _key_heads(text, heads) * head
    windows = _windows(text, layers)
    total = sum(map(prod, shapes.values()))
    linear = {name: shapes[name] for name, kind in kinds.items() if kind == LINEAR}
    experts = {name: shapes[name] for name, kind in kinds.items() if kind == EXPERTS}
    return Architecture(
        width=width,
        layers=layers,
        inner=_inner(text, width),
        queries=heads * head,
        keys=keys,
        vocabulary=_whole(text.get("vocab_size")) or max(shape[0] for shape in embeddings.values()),
        gated=str(text.get("hidden_act", text.get("activation_function", "silu"))) not in GATED,
        matrices=linear | experts,
        active=sum(map(prod, linear.values())) + round(routed_share(text) * sum(map(prod, experts.values()))),
        windows=windows,
        cached=_cached_numbers(text, keys),
        state=(layers - len(windows)) * _state_numbers(text),
        quantisable=sum(map(prod, linear.values())),
        ends=sum(map(prod, embeddings.values())),
        total=total,
    )


def _size(text: Mapping[str, Any], name: str) -> int:
    return next((found for key in NAMES[name] if (found := _whole(text.get(key)))), 0)


def _inner(text: Mapping[str, Any], width: int) -> int:
    inner = _size(text, "inner") or 4 * width
    active = _whole(text.get("num_experts_per_tok"))
    return active * (_whole(text.get("moe_intermediate_size")) or inner) if active else inner


def routed_share(text: Mapping[str, Any]) -> float:
    """Return the share of the experts that a token is sent to; 1 without experts."""
    active = _whole(text.get("num_experts_per_tok"))
    experts = next((found for key in EXPERT_COUNTS if (found := _whole(text.get(key)))), 0)
    return active / experts if active and experts else 1.0


def _windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = _whole(text.get("sliding_window")) or None
    kinds = text.get("layer_types")
    if not isinstance(kinds, list | tuple):
        return (window if text.get("use_sliding_window", True) else None,) * layers
    return tuple(
        window if "sliding" in kind else None
        for kind in map(str, kinds)
        if kind.endswith("attention") and "linear" not in kind
    )


def _key_heads(text: Mapping[str, Any], heads: int) -> int:
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return next((found for key in KEY_HEADS if (found := _whole(text.get(key)))), heads)


def _cached_numbers(text: Mapping[str, Any], keys: int) -> int:
    """Return the numbers of a token in the cache of a layer; of MLA, the compressed ones and the rotated ones."""
    compressed = _whole(text.get("kv_lora_rank"))
    return compressed + _whole(text.get("qk_rope_head_dim")) if compressed else 2 * keys


def _state_numbers(text: Mapping[str, Any]) -> int:
    """Return the numbers of an answer in a layer of the gated delta rule; 0 where the configuration names none."""
    keys, values = (
        (_whole(text.get(f"linear_num_{kind}_heads")), _whole(text.get(f"linear_{kind}_head_dim")))
        for kind in ("key", "value")
    )
    convolved = (2 * prod(keys) + prod(values)) * _whole(text.get("linear_conv_kernel_dim"))
    return convolved + prod(values) * keys[1]


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
