"""Quantised weights under an adapter: NF4 with double quantisation (QLoRA, arXiv:2305.14314), on GPUs and on the CPU.

Weights are quantised on loading and never saved: an artifact holds the adapter and the settings of quantisation. Gates
score, and merging sums, the quantised base, because the adapter was trained to correct it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.artifact import QUANTIZATION
from posttrain.errors import BadInput, Problem

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel

NF4 = "nf4"


def check_bitsandbytes(where: str) -> Problem | None:
    """Report bitsandbytes as missing; ``where`` is the setting that needs it."""
    if find_spec("bitsandbytes") is not None:
        return None
    fix = "pip install 'posttrain[bitsandbytes]', or choose variant=lora"
    return Problem(where=where, what="4-bit weights need bitsandbytes, which is not installed", fix=fix)


def quantisation_config(kind: str, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' settings for quantising to ``kind``, with products computed in ``compute``.

    Raises BadInput when bitsandbytes is missing or ``kind`` is not NF4.
    """
    from transformers import BitsAndBytesConfig

    if problem := check_bitsandbytes("quantization"):
        raise BadInput(problem)
    if kind != NF4:
        raise BadInput(Problem(where="quantization", what=f"weights are quantised to {NF4}, not to {kind}"))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Keep the layout of quantised weights; call it before the first forward pass.

    On CPUs with bfloat16 instructions, the first forward pass in evaluation mode would otherwise repack them in place,
    and later gradients and merged weights would be wrong in silence.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """Return ``model`` with ordinary weights of the quantised values; unchanged when it is not quantised."""
    if not is_quantised(model):
        return model
    plain: PreTrainedModel = model.dequantize(model.dtype)
    return plain


def is_quantised(model: PreTrainedModel) -> bool:
    """Return True when the weights of ``model`` were quantised on loading."""
    return getattr(model.config, "quantization_config", None) is not None


def save_quantisation(model: PreTrainedModel, output: Path) -> None:
    """Record the settings of quantisation of ``model`` in ``output``; nothing when it is not quantised."""
    if is_quantised(model):
        text = json.dumps(model.config.quantization_config.to_dict(), indent=2, sort_keys=True)
        (output / QUANTIZATION).write_text(text + "\n", encoding="utf-8")
