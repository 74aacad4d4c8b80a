"""AdamW on the trained parameters, and the clipping of their gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from posttrain.engine.config import LoopConfig


def make_optimizer(model: torch.nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """Return AdamW on the trained parameters of ``model``."""
    return make_adamw([(each, each.ndim) for each in model.parameters() if each.requires_grad], config)


def make_adamw(trained: Sequence[tuple[torch.nn.Parameter, int]], config: LoopConfig) -> torch.optim.AdamW:
    """Return AdamW (arXiv:1711.05101) on parameters, each given with the dimensions of the weight that it is a part of.

    It decays matrices only, LoRA's among them: vectors are norms and biases.
    """
    groups = [
        {"params": [each for each, dimensions in trained if dimensions >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each, dimensions in trained if dimensions < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def clip_gradient(model: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradient of all parameters together, slices of every process included, down to ``max_norm``.

    Returns its norm from before.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def update_weights(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change every weight by its gradient at the learning rate ``rate``, and free the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
