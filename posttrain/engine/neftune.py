"""NEFTune: uniform noise on the embeddings of training (arXiv:2310.05914).

Each entry of a document's embeddings gets alpha / sqrt(L D) times a number drawn evenly from -1 to 1. In the paper L is
the length of the sequence; in a packed row it is the length of each document, or packing would weaken the noise. The
numbers come from torch's own generator: its state is part of every checkpoint, and a resumed run draws the same.
"""

# B = rows (always 1), N = documents, T = tokens of all documents, L = tokens of one document, D = width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from posttrain.engine.ahead import on_device


@contextmanager
def noisy_embeddings(causal: PreTrainedModel, lengths: Sequence[int], alpha: float | None) -> Iterator[None]:
    """Add noise of strength ``alpha`` to the embeddings of a row of documents of ``lengths`` tokens.

    Nothing is added without ``alpha``, or while the model is in evaluation mode; then no random number is drawn either.
    """
    if not alpha or not causal.training:
        yield
        return

    def add_noise(module: torch.nn.Module, inputs: object, embedded_BTD: torch.Tensor) -> torch.Tensor:
        tokens = embedded_BTD.shape[1]
        # a model that cannot be packed embeds each document by itself
        return embedded_BTD + noise_like(embedded_BTD, lengths if tokens == sum(lengths) else [tokens], alpha)

    # a hook for one forward pass, because the lengths of the documents change with every batch
    handle = causal.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def noise_like(embedded_BTD: torch.Tensor, lengths: Sequence[int], alpha: float) -> torch.Tensor:
    """Return noise [B, T, D] for a row of documents, each scaled by its own length."""
    length_N = torch.tensor(lengths)
    length_T = length_N.repeat_interleave(length_N)
    scale_T = on_device(alpha / (length_T * embedded_BTD.shape[-1]).sqrt(), embedded_BTD.device)
    # drawn in float32, because bfloat16 has only 128 numbers between 1/2 and 1; rounded after scaling
    noise_BTD = torch.empty_like(embedded_BTD, dtype=torch.float32).uniform_(-1, 1)
    return (noise_BTD * scale_T[:, None]).to(embedded_BTD.dtype)
