"""Small models that llama.cpp can hold: of every family, with a tokenizer of bytes, random adapters on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from posttrain.artifact import Artifact
from posttrain.model.loading import load_model
from posttrain.model.saving import save_model, write_files
from tests.support.tiny import base_source, nudge, published

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if loud is defined and loud %}!{% endif %}{% endif %}"
)
TEXTS = ["The town of Norden has a brown flag.", "What is 17 + 25? It's 42, isn't it?", "def f(x): return x ** 2"] * 3
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama with scaled positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3, "attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 32}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True}),
}


def byte_level(rule: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = rule or pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], chat_template=TEMPLATE,
    )  # fmt: skip


def sentencepiece(*, legacy: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 and Mistral have it: pieces with bytes to fall back on, and a token before every text.

    A ``legacy`` one puts a space before every piece of a text between special tokens, another one before the first.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=160, show_progress=False)
    core.train_from_iterator([*TEXTS, "the then there other they banana bandana ana"], trainer)
    learned = json.loads(core.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    whole = dict.fromkeys("".join(pair) for pair in learned["merges"])
    merges = [  # every pair whose piece is known, as in a conversion from SentencePiece
        (token[:cut], token[cut:])
        for token in whole
        for cut in range(1, len(token))
        if token[:cut] in learned["vocab"] and token[cut:] in learned["vocab"]
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
        "[/INST]{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def write_model(
    folder: Path, family: str = "llama", rule: Any = None, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    config, kind, settings = FAMILIES[family]
    if tokenizer is not None:
        settings = {**settings, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = kind(
        config(
            **{
                "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "head_dim": 16,
                "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": [2, 0], **settings,
            }
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    write_files(model, folder)
    (tokenizer or byte_level(rule)).save_pretrained(folder)
    return folder


def adapter_on(base: Path, destination: Path, variables: dict[str, Any] | None = None, **settings: Any) -> Artifact:
    """Publish a random adapter; by default rank-stabilised, with other ranks for some layers."""
    source = base_source(base, template_variables=variables or {})
    model = load_model(source, "float32")
    given = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear",
             "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"k_proj": 3}}  # fmt: skip
    config = LoraConfig(**{**given, **settings}, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    nudge(model)
    draft = destination.with_name(f".{destination.name}")
    draft.mkdir(parents=True)
    save_model(model, source, draft, "float32")
    return published(draft, source, destination)
