"""A tiny random Llama, a tokenizer with a token per character, and an SFT artifact of the two; all of it seeded."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.artifact import Artifact, BaseWeights, Manifest, ModelSource, publish, quantization_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each printable character and chat marker."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[:3],
        chat_template=TEMPLATE,
    )


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """Return two layers of width 32 with grouped queries; weights large enough for attention to matter.

    ``settings`` replace those of the LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 3,
            **settings,
        }
    )
    return LlamaForCausalLM(config)


def write_base(folder: Path, **settings: Any) -> Path:
    """Write weights, configuration and tokenizer of a base model; return ``folder``."""
    from posttrain.model.saving import write_files

    write_files(tiny_llama(**settings), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_sft(folder: Path, base: Path, *, full: bool = False) -> Artifact:
    """Publish an artifact with random weights on ``base`` in ``folder``; its manifest says it has been through SFT.

    It holds a LoRA adapter, or with ``full`` all weights.
    """
    from posttrain.config.schema import Dtype, LoraSettings, ModelConfig
    from posttrain.model.base import resolve_base
    from posttrain.model.loading import load_model, new_adapter
    from posttrain.model.saving import save_model

    source = resolve_base(ModelConfig(path=str(base), dtype=Dtype.float32))
    model = load_model(source, "float32")
    model = model if full else new_adapter(model, LoraSettings(r=4, alpha=8), seed=0)
    _disturb(model)
    draft = folder.with_name(f".{folder.name}")
    draft.mkdir(parents=True)
    save_model(model, source, draft, "float32")
    return publish(draft, tiny_manifest(source, draft), folder)


def _disturb(model: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or not hasattr(model, "peft_config"):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def tiny_manifest(base: ModelSource, output: Path, **fields: Any) -> Manifest:
    """Return the manifest of an SFT artifact in ``output`` on ``base``; ``fields`` replace its own."""
    made = Manifest(
        stage="sft", kind="sft", plugin="posttrain", plugins=(), recipe="tiny",
        base=BaseWeights(name=base.base, digest=base.model_digest), parent_digest=base.digest, lineage=("sft",),
        data_digest="", chat_template=base.chat_template, added_tokens=base.added_tokens, fingerprint="", config={},
        template_variables=base.template_variables or None,
        seed=0, dtype="float32", quantization=quantization_of(output), versions={}, metrics={},
    )  # fmt: skip
    return replace(made, **fields)
