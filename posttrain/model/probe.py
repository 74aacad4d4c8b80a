"""Logits on a few tokens, saved with a stage's output and recomputed after reloading, to prove both are one model."""

# T = tokens, V = vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from posttrain.artifact import ModelSource
from posttrain.model.loading import added_token_ids
from posttrain.model.saving import is_sliced, writes

PROBE = "probe.safetensors"
DTYPE = "dtype"
PROBE_LENGTH = 24
"""Tokens of a probe, apart from the added tokens."""


@dataclass(frozen=True)
class Probe:
    """A few tokens, and their logits from the trained model in memory."""

    ids: torch.Tensor
    """[1, T]"""
    logits: torch.Tensor
    """[T, V] in float32."""
    dtype: str | None = None
    """Number format of the arithmetic, where it is not that of the stored weights."""

    @classmethod
    def take(cls, output: Path) -> Probe | None:
        """Return the probe in a stage's ``output``, or None; remove its file: it is no part of the result."""
        path = output / PROBE
        if not path.exists():
            return None
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            dtype = (file.metadata() or {}).get(DTYPE)
        path.unlink()
        return cls(tensors["ids"], tensors["logits"], dtype)


def leave_probe(model: Any, parent: ModelSource, output: Path) -> None:
    """Write the probe of ``model`` in memory into ``output``, for comparison with the model loaded from there.

    Every process computes it, as sliced weights need all; process 0 writes.
    """
    weight = model.get_input_embeddings().weight
    ids_1T = random_ids(weight.shape[0], added_token_ids(parent))
    found_TV = logits(model, ids_1T)
    # weights that are sliced stay in the number format of the arithmetic
    metadata = {DTYPE: str(weight.dtype).removeprefix("torch.")} if is_sliced(model) else None
    if writes():
        save_file({"ids": ids_1T, "logits": found_TV}, output / PROBE, metadata)


def random_ids(vocabulary: int, added: Sequence[int] = ()) -> torch.Tensor:
    """Return ids [1, T] of tokens from all over the vocabulary, always the same ones, and of every added token."""
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(vocabulary, (PROBE_LENGTH,), generator=generator)
    return torch.cat([ids_T, torch.tensor(list(added), dtype=ids_T.dtype)])[None]


def logits(model: Any, ids_1T: torch.Tensor) -> torch.Tensor:
    """Return the logits [T, V] of one row in float32 on the CPU, by plain attention.

    A training's own attention kernel rounds differently, and the reloaded model has none.
    """
    with torch.no_grad(), _plain_attention(model):
        logits_TV: torch.Tensor = model(input_ids=ids_1T.to(model.device), use_cache=False).logits[0]
    return logits_TV.float().cpu()


def difference(found_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """Return the root mean square of the difference of logits, relative to the spread of the expected ones.

    Relative, because models differ in the scale of their logits; computed in float64.
    """
    expected_TV = expected_TV.double()
    spread = (expected_TV - expected_TV.mean()).norm()
    return float((found_TV.double() - expected_TV).norm() / spread)


def set_attention(causal: PreTrainedModel, name: str) -> bool:
    """Give ``causal`` the attention ``name`` of transformers' registry; return False when its code knows no registry.

    Falcon's and BLOOM's are older than it. They keep their own attention, and take a mask all the same.
    """
    if not causal._can_set_attn_implementation():
        return False
    causal.set_attn_implementation(name)
    return True


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    attention, training = causal.config._attn_implementation, model.training
    set_attention(causal, "eager")
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        set_attention(causal, attention)
