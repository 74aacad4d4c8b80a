"""Layers that compute the same in fewer passes over memory while a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from posttrain.engine.lora import is_plain, lora_forward
from posttrain.engine.norm import is_norm, norm_forward

FUSED: tuple[tuple[Callable[[torch.nn.Module], bool], Callable[..., torch.Tensor]], ...] = (
    (is_plain, lora_forward),
    (is_norm, norm_forward),
)
"""Which layers are meant, and their forward pass."""


def fuse(model: torch.nn.Module) -> None:
    """Give every layer of ``model`` that has a fused forward pass that one; the others keep their own."""
    for module in model.modules():
        for meant, forward in FUSED:
            if "forward" not in vars(module) and meant(module):
                module.forward = partial(forward, module)


def unfuse(model: torch.nn.Module) -> None:
    """Give every layer its own forward pass again."""
    for module in model.modules():
        if is_fused(module):
            del module.forward


def is_fused(module: torch.nn.Module) -> bool:
    """Whether ``module`` has a fused forward pass."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func in (fused for _, fused in FUSED)
