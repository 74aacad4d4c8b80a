"""Cross-entropy of the trained tokens, as a sum, without ever holding the logits of a whole row.

The sum is divided once, by the trained tokens of the whole optimizer step, so that neither accumulation nor packing nor
the size of a chunk changes the gradient: a mean of means would weigh tokens of short rows more.
"""

# T = tokens of all documents, N = trained tokens, C = trained tokens of a chunk, D = width, V = vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from posttrain.errors import BadInput, Problem


@dataclass(frozen=True)
class OutputHead:
    """From hidden states to logits, as the model's own forward pass does it."""

    projection: torch.nn.Module
    scale: float
    """Multiplies the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""
    softcap: float | None
    """Squashes the logits to this range with tanh (arXiv:2408.00118)."""

    @classmethod
    def of(cls, causal: PreTrainedModel) -> OutputHead:
        """The head of a model; raises BadInput when it has none, or one that carries an adapter."""
        projection = causal.get_output_embeddings()
        if projection is None:
            raise BadInput(Problem(where="model.path", what=f"{type(causal).__name__} predicts no tokens"))
        if isinstance(projection, BaseTunerLayer):
            raise BadInput(Problem(where="lora.target_modules", what="the output projection carries no adapter"))
        config = causal.config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(projection, scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Logits [C, V] in float32."""
        logits_CV: torch.Tensor = self.projection(hidden_CD).float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        return logits_CV if self.softcap is None else torch.tanh(logits_CV / self.softcap) * self.softcap


def summed_cross_entropy(
    head: OutputHead, hidden_ND: torch.Tensor, targets_N: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Sum over N trained tokens of -log p(target), in nats, at most ``chunk`` rows of logits at once.

    Chunks are recomputed in the backward pass, which costs one more projection and saves the [N, V] logits.
    """

    def chunk_loss(hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head.logits(hidden_CD), targets_C, reduction="sum")

    losses = [
        checkpoint(chunk_loss, hidden_CD, targets_C, use_reentrant=False, preserve_rng_state=False)
        for hidden_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()
