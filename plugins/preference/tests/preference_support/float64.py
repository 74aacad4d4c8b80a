"""Log-probabilities and losses in float64, from the model on disk and the formulas of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.artifact import ModelSource
from posttrain.model.quantisation import dequantise, quantisation_config


def model_on_disk(parent: ModelSource) -> Any:
    """The model of ``parent`` in float64, with its adapter beside the weights."""
    model: Any = _quantised(parent) if parent.quantization else AutoModelForCausalLM.from_pretrained(parent.model)
    model.set_experts_implementation("eager")  # torch has no grouped product in float64
    if parent.adapter is not None:
        model = PeftModel.from_pretrained(model, parent.adapter)
    return model.double().eval()


def _quantised(parent: ModelSource) -> Any:
    """The values that the weights of 4 bits stand for."""
    settings = {"quantization_config": quantisation_config("nf4", torch.float32), "device_map": "cpu"}
    return dequantise(AutoModelForCausalLM.from_pretrained(parent.model, dtype=torch.float32, **settings))


def log_prob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Log-probability of an answer, token by token, with its gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for place in range(len(answer)):
        logits = model(torch.tensor([[*prompt, *answer[:place]]])).logits[0, -1]
        total = total + logits[answer[place]] - torch.logsumexp(logits, 0)
    return total


def log_probs(model: Any, rows: Any) -> list[list[float]]:
    """The same for every answer of every row, without gradient."""
    with torch.no_grad():
        return [[float(log_prob(model, row.prompt, ids)) for _, ids in row.answers] for row in rows]
