"""Weights of 4 bits under an adapter: NF4 with double quantisation (QLoRA, arXiv:2305.14314), on GPUs and on the CPU.

The weights are quantised as they are loaded and never saved: an artifact holds the adapter and how to quantise. The
scores of a gate and the merged weights are those of the quantised base, because that is what the adapter was trained
to correct.
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
    """What to install for quantised weights; ``where`` is the setting that asks for them."""
    if find_spec("bitsandbytes") is not None:
        return None
    fix = "pip install 'posttrain[bitsandbytes]', or choose variant=lora"
    return Problem(where=where, what="weights of 4 bits need bitsandbytes, which is not installed", fix=fix)


def quantisation_config(kind: str, compute: torch.dtype) -> BitsAndBytesConfig:
    """How transformers is to quantise, and the number format that products are computed in.

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
    """Keep the weights as they are quantised; to be called before the first forward pass.

    On CPUs with bfloat16 instructions, the first forward pass in evaluation mode would otherwise repack them in place,
    and gradients and merged weights computed afterwards would be wrong in silence.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with ordinary weights of the values that its quantised ones stand for; itself if it has none."""
    if not is_quantised(model):
        return model
    plain: PreTrainedModel = model.dequantize(model.dtype)
    return plain


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether the weights of ``model`` were quantised as it was loaded."""
    return getattr(model.config, "quantization_config", None) is not None


def save_quantisation(model: PreTrainedModel, output: Path) -> None:
    """Record in ``output`` how the weights of ``model`` are quantised; nothing when they are not."""
    if is_quantised(model):
        text = json.dumps(model.config.quantization_config.to_dict(), indent=2, sort_keys=True)
        (output / QUANTIZATION).write_text(text + "\n", encoding="utf-8")
