"""Log-probabilities and losses in float64, from the model on disk and the formulas of the papers."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from posttrain.artifact import ModelSource


def model_on_disk(parent: ModelSource) -> Any:
    """The model of ``parent`` in float64, with its adapter beside the weights."""
    model: Any = LlamaForCausalLM.from_pretrained(parent.model, dtype=torch.float64)
    if parent.adapter is not None:
        model = PeftModel.from_pretrained(model, parent.adapter, autocast_adapter_dtype=False)
    return model.double().eval()


def log_prob(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probability of an answer, token by token, with its gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for place in range(len(answer)):
        logits = model(torch.tensor([prompt + answer[:place]])).logits[0, -1]
        total = total + logits[answer[place]] - torch.logsumexp(logits, 0)
    return total


def log_probs(model: Any, rows: Any) -> list[list[float]]:
    """The same for every answer of every row, without gradient."""
    with torch.no_grad():
        return [[float(log_prob(model, row.prompt, ids)) for _, ids in row.answers] for row in rows]
