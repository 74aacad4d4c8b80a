"""A tiny random model, its tokenizer and its rows; everything is seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.artifact import Artifact, ModelSource, publish
from posttrain.config.schema import Dtype, Method, ModelConfig
from posttrain.model.base import resolve_base
from posttrain.model.probe import Probe
from posttrain.sft.config import SFTConfig
from posttrain.testing import Recorder as PlainRecorder
from posttrain.testing import tiny_llama, tiny_tokenizer, write_base
from posttrain.testing.tiny import TEMPLATE, VOCABULARY, tiny_manifest
from posttrain.tokens.packing import PackedRow

__all__ = ["TEMPLATE", "tiny_llama", "tiny_tokenizer", "write_base"]


def base_source(folder: Path, **settings: Any) -> ModelSource:
    """Return the base model in ``folder``, as a recipe would resolve it."""
    return resolve_base(ModelConfig(path=str(folder), dtype=Dtype.float32, **settings))


def published(output: Path, base: ModelSource, destination: Path, dtype: str = "float32") -> Artifact:
    """Publish a stage's ``output`` as the pipeline would."""
    Probe.take(output)
    return publish(output, tiny_manifest(base, output, dtype=dtype), destination)


def packed_rows(documents_per_row: Sequence[int], seed: int = 0, longest: int = 24) -> list[PackedRow]:
    """Return rows of random documents; in each, a random run of tokens after the first is trained."""
    generator = np.random.default_rng(seed)
    return [packed_row([_document(generator, longest) for _ in range(count)]) for count in documents_per_row]


def packed_row(documents: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> PackedRow:
    """Return one row of (ids, mask) documents."""
    return PackedRow(
        np.concatenate([ids for ids, _ in documents]),
        np.concatenate([mask for _, mask in documents]),
        tuple(len(ids) for ids, _ in documents),
    )


def documents_of(row: PackedRow) -> list[PackedRow]:
    """Return each document of a row, alone in a row of its own."""
    ends = np.cumsum(row.lengths)
    return [
        PackedRow(row.input_ids[end - length : end], row.mask[end - length : end], (length,))
        for end, length in zip(ends, row.lengths, strict=True)
    ]


def sft_config(**settings: Any) -> SFTConfig:
    """Return settings for a run of a few steps on the CPU."""
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


class Recorder(PlainRecorder):
    """A Progress that records every call, and can fail at a step."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.fail_at:
            raise Killed
        super().step(step, metrics)


class Killed(Exception):
    """Stands in for the death of the process."""


def _document(generator: np.random.Generator, longest: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    length = int(generator.integers(2, longest + 1))
    mask = np.zeros(length, dtype=bool)
    mask[int(generator.integers(1, length)) :] = True
    return generator.integers(4, VOCABULARY - 28, length).astype(np.int32), mask


def nudge(model: torch.nn.Module, seed: int = 0) -> None:
    """Change every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


TURNS = TEMPLATE.replace("{{ message['content'] }}", "<|turn|>{{ message['content'] }}")
"""A template that needs one of the added tokens."""
