"""Log-probabilities of given tokens, without ever holding the logits of a whole row.

The gradient of a log-probability is its one-hot minus the softmax, times whatever the loss above makes of it. Kept for
the backward pass are [N, D] numbers, never [N, V]: under a frozen projection the gradient for a factor of 1, scaled per
token later; under a trained one the hidden states, from which the backward pass computes each chunk of logits again.
"""

# N = scored tokens, C = scored tokens of a chunk, D = width, V = vocabulary

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.engine.loss import ChunkedLogits, OutputHead, projected, to_logits, to_product


def token_log_probs(head: OutputHead, hidden_ND: torch.Tensor, targets_N: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return log p(target) of each token, [N] in float32 at least, with at most ``chunk`` rows of logits held."""
    hidden_ND, weight_VD, bias_V = projected(head, hidden_ND)
    found_N: torch.Tensor = _TokenLogProbs.apply(
        hidden_ND, weight_VD, bias_V, targets_N, _Shape(chunk, head.scale, head.softcap)
    )
    return found_N


@dataclass(frozen=True)
class _Shape:
    """The size of a chunk, and what becomes of the projection's output on its way to logits."""

    chunk: int
    scale: float
    softcap: float | None

    def chunks(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk) for start in range(0, count, self.chunk))

    def log_probs(self, logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        """Return log p(target) [C] of the projection's output, and turn ``logits_CV`` into its gradient in place."""
        slope_CV = to_logits(logits_CV, self.scale, self.softcap)
        targets_C1 = targets_C[:, None]
        logits_CV -= logits_CV.amax(1, keepdim=True)
        target_C1 = logits_CV.gather(1, targets_C1)
        sum_C1 = logits_CV.exp_().sum(1, keepdim=True)
        logits_CV /= -sum_C1
        logits_CV.scatter_add_(1, targets_C1, logits_CV.new_ones(targets_C1.shape))  # one-hot minus softmax
        to_product(logits_CV, self.scale, slope_CV)
        return (target_C1 - sum_C1.log())[:, 0]


class _TokenLogProbs(torch.autograd.Function):
    """Log-probabilities [N] of the targets after a projection of hidden states [N, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        shape: _Shape,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ctx.shape, ctx.frozen = shape, not (wants_weight or wants_bias)
        precise = torch.promote_types(hidden_ND.dtype, torch.float32)
        found_N = torch.empty(len(targets_N), dtype=precise, device=hidden_ND.device)
        unit_ND = torch.empty_like(hidden_ND) if wants_hidden and ctx.frozen else None
        logits = ChunkedLogits(hidden_ND, weight_VD, bias_V, shape.chunk)
        for part in shape.chunks(len(targets_N)):
            logits_CV = logits.of(part)
            found_N[part] = shape.log_probs(logits_CV, targets_N[part])
            if unit_ND is not None:
                torch.mm(logits.rounded(logits_CV), weight_VD, out=unit_ND[part])
        if ctx.frozen:
            ctx.save_for_backward(unit_ND)
        else:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        return found_N

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.frozen:
            (unit_ND,) = ctx.saved_tensors
            scaled_ND = None if unit_ND is None else (unit_ND * grad_N[:, None]).to(unit_ND.dtype)
            return scaled_ND, None, None, None, None
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=grad_N.dtype) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=grad_N.dtype) if ctx.needs_input_grad[2] else None
        logits = ChunkedLogits(hidden_ND, weight_VD, bias_V, ctx.shape.chunk)
        for part in ctx.shape.chunks(len(targets_N)):
            slope_CV = logits.of(part)
            ctx.shape.log_probs(slope_CV, targets_N[part])
            slope_CV *= grad_N[part, None]
            product_CV = logits.rounded(slope_CV)
            if grad_hidden_ND is not None:
                torch.mm(product_CV, weight_VD, out=grad_hidden_ND[part])
            if grad_weight_VD is not None:
                grad_weight_VD += product_CV.T @ hidden_ND[part]
            if grad_bias_V is not None:
                grad_bias_V += slope_CV.sum(0)
        return (
            grad_hidden_ND,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
        )
