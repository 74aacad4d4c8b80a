"""Layers that compute the same in fewer passes over memory, with gradients in closed form: LoRA layers and RMSNorms.

peft casts the input of a LoRA layer (arXiv:2106.09685) to the adapter's float32, multiplies twice there, scales, adds
and casts back: on tall, thin matrices that costs as much as the layer itself. Here the adapter's factors, which are
small, take the number format of the activations, and their product is added to the layer's own in place. An RMSNorm
(arXiv:1910.07467) takes a third of autograd's time.

A layer is fused while a training runs, and only if its type, its parts and, for norms, a trial run show that it
computes exactly this. Every other layer keeps its own forward pass.
"""

# T = tokens of the batch, D = width, I = inputs of the layer, O = outputs of the layer, R = rank

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch.func import functional_call

from posttrain.model.loading import ADAPTER

FORWARD = "posttrain_forward"
"""Attribute of a layer: the fused forward pass for it, or None."""
TOLERANCE = 1e-5
"""Largest relative difference between the results of a module and of an RMSNorm for them to be one."""


def fuse(model: torch.nn.Module) -> None:
    """Give every layer of ``model`` its fused forward pass, if there is one for it."""
    recognise(model)
    for module in model.modules():
        forward = vars(module)[FORWARD]
        if "forward" not in vars(module) and forward is not None:
            module.forward = partial(forward, module)


def recognise(model: torch.nn.Module) -> None:
    """Note at every layer of ``model`` the fused forward pass for it, or None; it takes whole weights to tell."""
    for module in model.modules():
        if FORWARD not in vars(module):
            setattr(module, FORWARD, next((forward for is_kind, forward in FUSED if is_kind(module)), None))


def unfuse(model: torch.nn.Module) -> None:
    """Give every layer its own forward pass again."""
    for module in model.modules():
        vars(module).pop(FORWARD, None)
        if is_fused(module):
            del module.forward


def is_fused(module: torch.nn.Module) -> bool:
    """Return true while ``module`` has a fused forward pass."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func in (fused for _, fused in FUSED)


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
    """Compute a plain LoRA layer, from ``inputs`` [..., I] to [..., O]; leave anything else to peft."""
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
    """Return true for a LoRA layer without dropout, variant (DoRA), bias of its own or quantised weight."""
    return (
        type(layer) is Linear
        and type(layer.base_layer) is torch.nn.Linear
        and not layer.base_layer.weight.requires_grad
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and getattr(layer.lora_dropout[ADAPTER], "p", 0.0) == 0.0  # Identity, or a dropout that is off
    )


class RootMeanSquareNorm(torch.autograd.Function):
    """``w x / sqrt(mean(x^2) + eps)``, normalised in float32 at least; gradients for x and w."""

    @staticmethod
    def forward(ctx: Any, input_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the outputs [T, D], in the number format of the inputs times the weight."""
        precise_TD = input_TD.to(torch.promote_types(input_TD.dtype, torch.float32))
        norm_T1 = torch.linalg.vector_norm(precise_TD, dim=-1, keepdim=True)
        inverse_T1 = norm_T1.square_().div_(input_TD.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(input_TD, weight_D, inverse_T1)
        output_TD: torch.Tensor = weight_D * (precise_TD * inverse_T1).to(input_TD.dtype)
        return output_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        input_TD, weight_D, inverse_T1 = ctx.saved_tensors
        precise_TD = input_TD.to(inverse_T1.dtype)
        grad_weight_D = None
        if ctx.needs_input_grad[1]:
            grad_weight_D = (grad_TD * (precise_TD * inverse_T1)).sum(0).to(weight_D.dtype)
        scaled_TD = (grad_TD * weight_D).to(inverse_T1.dtype)
        share_T1 = torch.linalg.vecdot(scaled_TD, precise_TD)[..., None] * inverse_T1**3 / -input_TD.shape[-1]
        return scaled_TD.mul_(inverse_T1).addcmul_(precise_TD, share_T1).to(input_TD.dtype), grad_weight_D, None


def norm_forward(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Compute an RMSNorm module for ``inputs`` [..., D]."""
    flat_TD = inputs.reshape(-1, inputs.shape[-1])
    outputs_TD: torch.Tensor = RootMeanSquareNorm.apply(flat_TD, module.weight, eps(module))
    return outputs_TD.view(inputs.shape)


def eps(module: torch.nn.Module) -> float | None:
    """Return the number added to the mean square, by either of its names; None for other modules."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def is_norm(module: torch.nn.Module) -> bool:
    """Return true for an RMSNorm: by the name of its class, its parts and a trial."""
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or eps(module) is None or not isinstance(weight, torch.Tensor):
        return False
    if weight.ndim != 1 or len(list(module.parameters())) != 1:
        return False
    if len(signature(module.forward).parameters) != 1:  # a gated norm takes the gate as well
        return False
    # the trial: Gemma's norms have the name and the parts, but multiply by 1 + w
    generator = torch.Generator().manual_seed(0)
    inputs_TD = torch.randn(2, len(weight), generator=generator).to(weight.device, weight.dtype)
    # a weight of its own: that of the module may be a slice
    weight_D = torch.randn(len(weight), generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected_TD = functional_call(module, {"weight": weight_D}, (inputs_TD,))
        found_TD = RootMeanSquareNorm.apply(inputs_TD, weight_D, eps(module))
    if expected_TD.shape != found_TD.shape or expected_TD.dtype != found_TD.dtype:
        return False
    return bool((found_TD - expected_TD).norm() <= TOLERANCE * expected_TD.norm())


FUSED: tuple[tuple[Callable[[torch.nn.Module], bool], Callable[..., torch.Tensor]], ...] = (
    (is_plain, lora_forward),
    (is_norm, norm_forward),
)
"""A test for each kind of layer, and the forward pass of those it is true for."""
