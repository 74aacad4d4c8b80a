"""Fused norms compute what the modules of transformers do; what only looks like one is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from posttrain.engine.fused import RootMeanSquareNorm, is_norm, norm_forward

WIDTH = 24


class MeanFreeRMSNorm(LlamaRMSNorm):
    """Has the name and the parts, and computes something else."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Centred first."""
        result: torch.Tensor = super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))
        return result


def trained(module: Any) -> Any:
    """With weights that are not all 1."""
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norms_are_recognised(kind: type) -> None:
    assert is_norm(trained(kind(WIDTH)))
    assert is_norm(trained(kind(WIDTH)).to(torch.bfloat16))


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Gemma3RMSNorm, Cohere2LayerNorm, MeanFreeRMSNorm])
def test_what_computes_something_else_is_left_alone(kind: type) -> None:
    assert not is_norm(trained(kind(WIDTH)))


@pytest.mark.parametrize("frozen", [False, True])
def test_outputs_and_gradients_are_the_modules_own(frozen: bool) -> None:
    module = trained(LlamaRMSNorm(WIDTH))
    module.weight.requires_grad_(not frozen)
    inputs, outer = torch.randn(2, 3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (lambda leaf: norm_forward(module, leaf), module):
        module.zero_grad()
        leaf = inputs.clone().requires_grad_()
        output = forward(leaf)
        (output * outer).sum().backward()
        results.append([output.detach(), leaf.grad, *([] if frozen else [module.weight.grad.clone()])])
    for actual, wanted in zip(*results, strict=True):
        assert float((actual - wanted).norm() / wanted.norm()) <= 1e-6


def test_the_gradient_is_that_of_the_function() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: RootMeanSquareNorm.apply(x, w, 1e-3), (inputs, weight))
