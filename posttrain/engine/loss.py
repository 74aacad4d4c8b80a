"""Summed cross-entropy of the trained tokens, without ever holding the logits of a whole row.

At a vocabulary of 150,000, float32 logits of 2,048 tokens take 1.2 GB, and their gradient as much again: more than the
weights of a small model. So they are computed in chunks, each reduced at once to its loss and gradients.

The sum is divided once, by the trained tokens of the whole optimizer step: neither accumulation nor packing nor the
size of a chunk changes the gradient. A mean of means would weigh tokens of short rows more.
"""

# T = tokens of all documents, N = trained tokens, C = trained tokens of a chunk, D = width, V = vocabulary

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from posttrain.errors import BadInput, Problem


@dataclass(frozen=True)
class OutputHead:
    """The way from hidden states to logits, as in the model's own forward pass."""

    projection: torch.nn.Module
    scale: float
    """Multiplies the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""
    softcap: float | None
    """Squashes the logits to this range with tanh (arXiv:2408.00118)."""

    @classmethod
    def of(cls, causal: PreTrainedModel) -> OutputHead:
        """Return the head of a model; raises BadInput when there is none, or it carries an adapter."""
        projection = causal.get_output_embeddings()
        if projection is None:
            raise BadInput(Problem(where="model.path", what=f"{type(causal).__name__} predicts no tokens"))
        if isinstance(projection, BaseTunerLayer):
            raise BadInput(Problem(where="lora.target_modules", what="the output projection carries no adapter"))
        config = causal.config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(projection, scale, getattr(config, "final_logit_softcapping", None))

    def at(self, temperature: float) -> OutputHead:
        """Return the head of the logits divided by a temperature. Raises BadInput where a cap follows the scale."""
        if temperature == 1.0:
            return self
        if self.softcap is not None:
            what = f"{temperature:g}, but the model caps its logits, which are trained at temperature 1 alone"
            raise BadInput(Problem(where="temperature", what=what, fix="Set temperature: 1.0"))
        return replace(self, scale=self.scale / temperature)

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Return logits [C, V] in float32."""
        logits_CV: torch.Tensor = self.projection(hidden_CD).float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        return logits_CV if self.softcap is None else torch.tanh(logits_CV / self.softcap) * self.softcap


def summed_cross_entropy(
    head: OutputHead, hidden_ND: torch.Tensor, targets_N: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return the sum of -log p(target) over N trained tokens, in nats, with at most ``chunk`` rows of logits held."""
    hidden_ND, weight_VD, bias_V = projected(head, hidden_ND)
    loss: torch.Tensor = _SummedCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, targets_N, chunk, head.scale, head.softcap
    )
    return loss


def projected(head: OutputHead, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return hidden states [N, D], the projection's weight [V, D] and its bias [V], in the format of autocast."""
    weight_VD: Any = head.projection.weight
    bias_V: torch.Tensor | None = getattr(head.projection, "bias", None)
    # autocast leaves products with out= alone, as those of chunked logits: the casts are made here, for autograd
    if torch.is_autocast_enabled(hidden_ND.device.type):
        kind = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(kind), weight_VD.to(kind)
        bias_V = None if bias_V is None else bias_V.to(kind)
    return hidden_ND, weight_VD, bias_V


class ChunkedLogits:
    """The projection's output for one chunk after another, in one piece of memory."""

    def __init__(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, chunk: int
    ) -> None:
        self.hidden_ND, self.weight_VD, self.bias_V = hidden_ND, weight_VD, bias_V
        precise = torch.promote_types(hidden_ND.dtype, torch.float32)
        self.product_CV = hidden_ND.new_empty(min(chunk, len(hidden_ND)), len(weight_VD))
        own = precise == hidden_ND.dtype
        self.precise_CV = self.product_CV if own else torch.empty_like(self.product_CV, dtype=precise)

    def of(self, part: slice) -> torch.Tensor:
        """Return the output [C, V] for a chunk, in float32 at least; the next call overwrites it."""
        hidden_CD = self.hidden_ND[part]
        product_CV, precise_CV = self.product_CV[: len(hidden_CD)], self.precise_CV[: len(hidden_CD)]
        torch.mm(hidden_CD, self.weight_VD.T, out=product_CV)
        if precise_CV is not product_CV:
            precise_CV.copy_(product_CV)
        if self.bias_V is not None:
            precise_CV += self.bias_V
        return precise_CV

    def rounded(self, precise_CV: torch.Tensor) -> torch.Tensor:
        """Return ``precise_CV`` in the number format of the hidden states."""
        product_CV = self.product_CV[: len(precise_CV)]
        return product_CV.copy_(precise_CV)


class _SummedCrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass, its gradients: kept for the backward pass are [N, D] and [V, D], never [N, V]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # Sums run in float32 at least: exp and log of bfloat16 logits lose the small probabilities, and the gradient of
        # the weight adds up over all chunks, where bfloat16 would soon absorb each new chunk.
        precise = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=precise) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=precise) if wants_bias and bias_V is not None else None
        chunks = ChunkedLogits(hidden_ND, weight_VD, bias_V, chunk)
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            logits_CV = chunks.of(part)
            loss += _loss_and_gradient(logits_CV, targets_N[part], scale, softcap)
            product_CV = chunks.rounded(logits_CV)
            if grad_hidden_ND is not None:
                torch.mm(product_CV, weight_VD, out=grad_hidden_ND[part])
            if grad_weight_VD is not None:
                grad_weight_VD += product_CV.T @ hidden_ND[part]
            if grad_bias_V is not None:
                grad_bias_V += logits_CV.sum(0)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # the gradients were taken for a factor of 1; the graph behind has one factor, 1 / trained tokens of the step
        scaled = [None if part is None else part.mul_(grad.to(part.dtype)) for part in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _loss_and_gradient(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Return the summed cross-entropy of the projection's output, and turn ``logits_CV`` into its gradient in place."""
    slope_CV = to_logits(logits_CV, scale, softcap)
    targets_C1 = targets_C[:, None]
    # softmax does not change when the largest logit is subtracted, and no exp overflows
    logits_CV -= logits_CV.amax(1, keepdim=True)
    target_C1 = logits_CV.gather(1, targets_C1)
    sum_C1 = logits_CV.exp_().sum(1, keepdim=True)
    loss = (sum_C1.log() - target_C1).sum()
    logits_CV /= sum_C1
    logits_CV.scatter_add_(1, targets_C1, logits_CV.new_full(targets_C1.shape, -1.0))  # softmax minus one-hot
    to_product(logits_CV, scale, slope_CV)
    return loss


def to_logits(product_CV: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor | None:
    """Turn the projection's output into logits in place; return the slope [C, V] of the softcap, None without one."""
    if scale != 1.0:
        product_CV *= scale
    if softcap is None:
        return None
    product_CV.div_(softcap).tanh_().mul_(softcap)
    return 1 - (product_CV / softcap) ** 2


def to_product(gradient_CV: torch.Tensor, scale: float, slope_CV: torch.Tensor | None) -> None:
    """Turn the gradient of logits into that of the projection's output in place."""
    if slope_CV is not None:
        gradient_CV *= slope_CV
    if scale != 1.0:
        gradient_CV *= scale
