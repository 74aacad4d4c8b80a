"""Weights under the names, and in the layout, of llama.cpp.

Llama and Mistral rotate pairs of halves in transformers and pairs of neighbours in llama.cpp: the rows of their query
and key projections change places. Qwen rotates halves in both.
"""

# N = heads, H = rows of a head, D = width of the input, R = rank

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.errors import reject
from posttrain.model.base import weight_files
from posttrain.model.trust import read_json

if TYPE_CHECKING:
    from gguf import TensorNameMap

FAMILIES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Architecture of llama.cpp by transformers' type of model."""
PERMUTED = "LLAMA"
LINEAR = ("q_proj", "k_proj")
"""Projections whose rows change places."""
Values = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Architecture:
    """The model that a file describes, by the configuration of transformers."""

    config: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Architecture:
        """Read the configuration in ``folder``. Raises BadInput for a model that the files cannot hold."""
        config = read_json(folder / "config.json")
        where, kind = str(folder / "config.json"), config.get("model_type")
        if kind not in FAMILIES:
            fix = f"GGUF files are written for {', '.join(sorted(FAMILIES))}; --to merged serves every model"
            reject(where, f"the architecture is {kind}", fix)
        layers = config.get("layer_types") or []
        windowed = config.get("sliding_window") and (kind == "mistral" or config.get("use_sliding_window"))
        if windowed or "sliding_attention" in layers:
            reject(where, "the attention has a sliding window", "llama.cpp reads this architecture without one")
        rope = _rope(config).get("rope_type", "default")
        if rope not in ("default", "linear", "llama3", "yarn"):
            reject(where, f"rope_type is {rope}", "Files are written for default, linear, llama3 and yarn")
        return cls(config)

    @property
    def name(self) -> str:
        """Name of the architecture in gguf."""
        return FAMILIES[self.config["model_type"]]

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(self.config["num_attention_heads"])

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)

    @property
    def rope(self) -> Mapping[str, Any]:
        """Settings of the rotary positions."""
        return _rope(self.config)

    @functools.cached_property
    def names(self) -> TensorNameMap:
        """Names of llama.cpp by those of transformers."""
        from gguf import MODEL_ARCH, get_tensor_name_map

        return get_tensor_name_map(MODEL_ARCH[self.name], self.layers)

    def rename(self, name: str, where: Path) -> str:
        """Return the name of a weight in the file. Raises BadInput for a weight that has no place there."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            reject(str(where), f"{name} has no place in a GGUF file of this architecture", "Use --to merged")
        return str(found)

    def arranged(self, name: str, values: Values) -> Values:
        """Return the rows [NH, ...] of a query or key projection in the order of llama.cpp; others as they are."""
        if self.name != PERMUTED or name.split(".")[-2] not in LINEAR:
            return values
        heads = self.heads if ".q_proj." in name else self.key_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))

    def rope_factors(self) -> Values | None:
        """Return the divisors of Llama 3's rotary frequencies; None for another scaling (Llama 3.1, HF's formula)."""
        rope = self.rope
        if rope.get("rope_type") != "llama3":
            return None
        frequencies = rope["rope_theta"] ** -(np.arange(0, self.head_width, 2, dtype=np.float64) / self.head_width)
        waves = 2 * np.pi / frequencies
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        context = rope["original_max_position_embeddings"]
        smooth = np.clip((context / waves - low) / (high - low), 0, 1)
        divisors: Values = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
        return divisors


def stored_weights(folder: Path, architecture: Architecture) -> Iterator[tuple[str, Values]]:
    """Yield name and float32 values of every weight, as the file holds them, one at a time."""
    from safetensors import safe_open

    tied = bool(architecture.config.get("tie_word_embeddings"))
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                if name == "lm_head.weight" and tied:
                    continue
                values: Values = file.get_tensor(name).float().numpy()
                yield architecture.rename(name, path), architecture.arranged(name, values)
    factors = architecture.rope_factors()
    if factors is not None:
        yield "rope_freqs.weight", factors


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rotary settings of new and of old configurations in one form."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found
