"""GGUF files: a whole model, or a LoRA adapter beside the file of its base."""

# R = rank, D = width of the input, O = width of the output

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.errors import reject
from posttrain.export.tensors import Architecture, Values, stored_weights
from posttrain.export.vocabulary import Vocabulary
from posttrain.model.base import ADAPTER_WEIGHTS
from posttrain.model.trust import read_json

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f16", "f32", "q8_0")
"""Number formats of the matrices; vectors stay float32."""
EXACT = ("f16", "f32")
"""Formats whose answers have to be those of the weights."""
PREFIX = "base_model.model."
"""Beginning of the names of peft."""


def write_model(folder: Path, path: Path, name: str, vocabulary: Vocabulary, kind: str = "f16") -> None:
    """Write the weights in ``folder`` with their tokenizer to ``path``, the matrices as ``kind``.

    Raises BadInput for a weight that has no place in the file.
    """
    from gguf import GGMLQuantizationType, LlamaFileType

    architecture = Architecture.of(folder)
    writer = _writer(path, architecture, name)
    files = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(files[kind])
    writer.add_quantization_version(2)
    _add_shape(writer, architecture)
    vocabulary.write(writer)
    # Each weight is read twice: the file begins with the places of all of them, and one at a time is held in memory.
    for tensor, values in stored_weights(folder, architecture):
        chosen = _format(tensor, values, kind)
        encoded = _encode(values[:1] if values.ndim == 2 else values, chosen)
        rows = values.shape[0] if values.ndim == 2 else 1
        shape = (rows, *encoded.shape[1:]) if values.ndim == 2 else encoded.shape
        raw = None if encoded.dtype != np.uint8 else GGMLQuantizationType(chosen)
        writer.add_tensor_info(tensor, shape, encoded.dtype, encoded.nbytes * rows, raw_dtype=raw)
    _open(writer)
    for tensor, values in stored_weights(folder, architecture):
        writer.write_tensor_data(_encode(values, _format(tensor, values, kind)))
    writer.close()


def write_adapter(adapter: Path, base: Path, path: Path, name: str) -> None:
    """Write the LoRA adapter in ``adapter`` on the weights in ``base`` to ``path``, in float32.

    llama.cpp multiplies by alpha / rank, with one alpha for the file. The scaling of peft, rank-stabilised or by a
    pattern, is that of the first matrix in alpha, and a factor on the others where they differ.

    Raises BadInput for an adapter with more than plain LoRA matrices.
    """
    config = read_json(adapter / "adapter_config.json")
    check_plain(config, adapter)
    architecture = Architecture.of(base)
    pairs = dict(_pairs(adapter, architecture))
    alphas = {module: _alpha(config, module, rank=pair[0].shape[0]) for module, pair in pairs.items()}
    alpha = next(iter(alphas.values()))
    writer = _writer(path, architecture, name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for module, (a_RD, b_OR) in pairs.items():
        tensor = architecture.rename(f"{module}.weight", adapter)
        writer.add_tensor(f"{tensor}.lora_a", a_RD)
        writer.add_tensor(f"{tensor}.lora_b", b_OR * np.float32(alphas[module] / alpha))
    _open(writer, tensors=False)
    writer.write_tensors_to_file()
    writer.close()


def check_plain(config: Mapping[str, Any], adapter: Path) -> None:
    """Raise BadInput unless an adapter is LoRA matrices on linear layers, and nothing else."""
    kind = config.get("peft_type")
    found = [f"it is {kind}"] if kind != "LORA" else []
    found += ["it is DoRA"] if config.get("use_dora") else []
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias"):
        found += [f"it has {key}"] if config.get(key) else []
    found += ["it trains biases"] if config.get("bias", "none") != "none" else []
    found += [] if config.get("init_lora_weights") in (True, False, "gaussian") else ["it starts from changed weights"]
    if found:
        what = f"{', '.join(found)}, which a GGUF adapter cannot hold"
        reject(str(adapter), what, "Merge it into the file: --to gguf")


def _alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the alpha whose quotient by the rank is the scaling of peft for a module."""
    alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that ends a module's name, as peft matches them."""
    import re

    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _pairs(adapter: Path, architecture: Architecture) -> Iterator[tuple[str, tuple[Values, Values]]]:
    """Yield the matrices A [R, D] and B [O, R] of every adapted module, by its name in transformers."""
    from safetensors import safe_open

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            partner = f"{PREFIX}{module}.lora_B.weight"
            if name == partner or name.endswith(".lora_B.weight"):
                continue
            if not name.endswith(".lora_A.weight") or partner not in names:
                reject(str(adapter / ADAPTER_WEIGHTS), f"{name} is no LoRA matrix", "Merge it into the file: --to gguf")
            a_RD, b_OR = (file.get_tensor(each).float().numpy() for each in (name, partner))
            yield module, (a_RD, architecture.arranged(f"{module}.weight", b_OR))


def _writer(path: Path, architecture: Architecture, name: str) -> GGUFWriter:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

    writer = GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH[architecture.name]])
    writer.add_name(name)
    return writer


def _open(writer: GGUFWriter, *, tensors: bool = True) -> None:
    """Write everything before the weights."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if tensors:
        writer.write_ti_data_to_file()


def _add_shape(writer: GGUFWriter, architecture: Architecture) -> None:
    """Write the sizes of a model and its rotary positions."""
    from gguf import RopeScalingType

    config, rope = architecture.config, architecture.rope
    writer.add_type("model")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(architecture.layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.key_heads)
    writer.add_key_length(architecture.head_width)
    writer.add_value_length(architecture.head_width)
    writer.add_rope_dimension_count(architecture.head_width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if (original := rope.get("original_max_position_embeddings")) is not None:
            writer.add_rope_scaling_orig_ctx_len(original)


def _format(tensor: str, values: Values, kind: str) -> GGMLQuantizationType:
    """Return the number format of a weight: float32 for vectors, float16 for rows that are no whole blocks of 32."""
    from gguf import GGMLQuantizationType

    if values.ndim == 1 or kind == "f32" or tensor.startswith("rope_freqs"):
        return GGMLQuantizationType.F32
    if kind == "q8_0" and values.shape[-1] % 32 == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16


def _encode(values: Values, chosen: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    from gguf.quants import quantize

    return np.ascontiguousarray(quantize(values, chosen))
