"""The models of the benchmarks: their weights, and the sizes that their speed depends on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import machine

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart" / "base"
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def random_llama(folder: Path, **settings: int) -> str:
    """Return a Llama of 8 billion random bfloat16 weights, or other ``settings``, with the quickstart's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B | settings, dtype="bfloat16"))
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART).save_pretrained(folder)
    return str(folder)


def random_causal(settings: Mapping[str, int], dtype: str) -> Any:
    """Return a Llama of random weights with these ``settings``, made on the device in ``dtype``."""
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with machine.torch_device():
            return llama(settings)
    finally:
        torch.set_default_dtype(torch.float32)


def llama(settings: Mapping[str, int]) -> Any:
    """Return a Llama whose output projection is a matrix of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False))


def shapes(model: str) -> list[tuple[int, int]]:
    """Return rows and columns of the main weights of one layer: of attention, into the MLP, and out of it."""
    config = _config(model)
    width, hidden = config.hidden_size, config.intermediate_size
    return [(width, width), (hidden, width), (width, hidden)]


def multiplying_parameters(model: str) -> int:
    """Count the parameters that multiply: all but an input embedding that is not the output projection, too."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(_config(model))
    total = sum(parameter.numel() for parameter in causal.parameters())
    tied = causal.get_input_embeddings().weight is causal.get_output_embeddings().weight
    return total if tied else total - causal.get_input_embeddings().weight.numel()


def _config(model: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, local_files_only=True)
