"""LoRA layers (arXiv:2106.09685) computed in as few passes over memory as possible.

peft casts a layer's input to the adapter's float32, multiplies twice there, scales, adds and casts back: on tall, thin
matrices that costs as much as the layer itself. Here the adapter's factors, which are small, take the number format of
the activations, and their product is added to the layer's own in place; the gradients follow in closed form.
"""

# T = tokens of the batch, I = inputs of the layer, O = outputs of the layer, R = rank

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear

from posttrain.model.loading import ADAPTER


class LoraProduct(torch.autograd.Function):
    """``x W^T + b + scale (x A^T) B^T`` for a frozen W; gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        input_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The outputs [T, O], in the number format of the inputs."""
        low_TR = input_TI @ a_RI.to(input_TI.dtype).T
        output_TO = F.linear(input_TI, weight_OI, bias_O)
        # not addmm_: its rounding depends on the number of tokens, which would show between packed and unpacked rows
        output_TO.add_(low_TR @ b_OR.to(input_TI.dtype).T, alpha=scale)
        ctx.save_for_backward(input_TI, weight_OI, a_RI, b_OR, low_TR)
        ctx.scale = scale
        return output_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients in the order of the arguments; those of A and B in the number format of A and B."""
        input_TI, weight_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        low_grad_TR = (grad_TO @ b_OR.to(grad_TO.dtype)).mul_(ctx.scale)
        grad_a_RI = (low_grad_TR.T @ input_TI).to(a_RI.dtype)
        grad_b_OR = (grad_TO.T @ low_TR).to(b_OR.dtype).mul_(ctx.scale)
        grad_TI = None
        if ctx.needs_input_grad[0]:
            grad_TI = (grad_TO @ weight_OI).addmm_(low_grad_TR, a_RI.to(grad_TO.dtype))
        return grad_TI, None, None, grad_a_RI, grad_b_OR, None


def lora_forward(layer: Any, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What a plain LoRA layer computes, for ``inputs`` [..., I] as [..., O]; anything else is left to peft."""
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER] or args or kwargs:
        result: torch.Tensor = type(layer).forward(layer, inputs, *args, **kwargs)
        return result
    outputs_TO: torch.Tensor = LoraProduct.apply(
        inputs.reshape(-1, inputs.shape[-1]),
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.lora_A[ADAPTER].weight,
        layer.lora_B[ADAPTER].weight,
        layer.scaling[ADAPTER],
    )
    return outputs_TO.view(*inputs.shape[:-1], -1)


def is_plain(layer: Any) -> bool:
    """Whether ``layer`` is a LoRA layer without dropout, variant such as DoRA, bias of its own or quantised weight."""
    return (
        type(layer) is Linear
        and type(layer.base_layer) is torch.nn.Linear
        and not layer.base_layer.weight.requires_grad
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
    )
