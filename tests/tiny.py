"""A tiny random model, its tokenizer and rows for it; everything is seeded."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.artifact import Artifact, ModelSource, publish, quantization_of, template_record
from posttrain.config.schema import Dtype, Method, ModelConfig
from posttrain.data.packing import PackedRow
from posttrain.model.base import resolve_base
from posttrain.model.probe import Probe
from posttrain.sft.config import SFTConfig

VOCABULARY = 128
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, and the chat markers."""
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
    """Two layers of width 32 with grouped queries; weights large enough for attention to matter."""
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
    """A model directory with weights, configuration and tokenizer."""
    tiny_llama(**settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def base_source(folder: Path, **settings: Any) -> ModelSource:
    """The base model in ``folder``, as a recipe would resolve it."""
    return resolve_base(ModelConfig(path=str(folder), dtype=Dtype.float32, **settings))


def published(output: Path, base: ModelSource, destination: Path, dtype: str = "float32") -> Artifact:
    """What a stage left in ``output``, as the pipeline would publish it."""
    manifest = {
        "stage": "sft",
        "base": {"name": base.base, "digest": base.model_digest},
        "lineage": ["sft"],
        "dtype": dtype,
        "quantization": quantization_of(output),
        **template_record(base.chat_template),
        "added_tokens": list(base.added_tokens),
    }
    Probe.take(output)
    return publish(output, manifest, destination)


def packed_rows(documents_per_row: Sequence[int], seed: int = 0, longest: int = 24) -> list[PackedRow]:
    """Rows of random documents; in each, a random run of tokens after the first is trained."""
    generator = np.random.default_rng(seed)
    return [packed_row([_document(generator, longest) for _ in range(count)]) for count in documents_per_row]


def packed_row(documents: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> PackedRow:
    """One row of (ids, mask) documents."""
    return PackedRow(
        np.concatenate([ids for ids, _ in documents]),
        np.concatenate([mask for _, mask in documents]),
        tuple(len(ids) for ids, _ in documents),
    )


def documents_of(row: PackedRow) -> list[PackedRow]:
    """Each document of a row, alone in a row of its own."""
    ends = np.cumsum(row.lengths)
    return [
        PackedRow(row.input_ids[end - length : end], row.mask[end - length : end], (length,))
        for end, length in zip(ends, row.lengths, strict=True)
    ]


def sft_config(**settings: Any) -> SFTConfig:
    """Settings for a run of a few steps on the CPU."""
    quick: Mapping[str, Any] = {
        "kind": "sft",
        "data": "train.jsonl",
        "gate": None,
        "method": Method.lora,
        "lr": 1e-2,
        "sequence_length": 64,
        "gradient_accumulation": 2,
        "checkpoint_steps": 1,
        "gradient_checkpointing": False,
    }
    return SFTConfig(**{**quick, **settings})


class Recorder:
    """A Progress that keeps what it is told, and can fail at a step."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.started: tuple[int, int] = (0, 0)
        self.steps: dict[int, Mapping[str, float]] = {}
        self.notes: list[str] = []

    def start(self, total_steps: int, done_steps: int = 0) -> None:
        self.started = (total_steps, done_steps)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.fail_at:
            raise Killed
        self.steps[step] = metrics

    def note(self, text: str) -> None:
        self.notes.append(text)


class Killed(Exception):
    """The process died here."""


def _document(generator: np.random.Generator, longest: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    length = int(generator.integers(2, longest + 1))
    mask = np.zeros(length, dtype=bool)
    mask[int(generator.integers(1, length)) :] = True
    return generator.integers(4, VOCABULARY - 28, length).astype(np.int32), mask
