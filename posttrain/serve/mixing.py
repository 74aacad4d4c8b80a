"""Several adapters in one forward pass, by one product for all rows of a layer.

peft's own mixed batch computes each adapter's rows apart: with eight adapters, eight times the calls of every layer.
Here the rows' matrices are stacked, and two batched products take all rows at once. Layers that this does not fit
(other ranks, biases, variants, embeddings) and batches of two adapters or fewer are left to peft.
"""

# B = rows with an adapter, T = tokens, I = inputs, O = outputs, R = rank

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear

from posttrain.serve.lane import BASE

FEWEST = 3
"""Adapters in a batch from which on stacking is faster."""


def mix(model: PeftModel) -> PeftModel:
    """Have every plain linear layer of ``model`` stack the adapters of a mixed batch; return the model."""
    for layer in model.modules():
        if type(layer) is Linear and "_mixed_batch_forward" not in vars(layer):
            vars(layer)["_mixed_batch_forward"] = partial(_forward, layer, layer._mixed_batch_forward)
    return model


def _forward(layer: Any, plain: Any, x: torch.Tensor, *given: Any, adapter_names: Sequence[str], **options: Any) -> Any:
    names = [name for name in adapter_names if name != BASE and name in layer.lora_A]
    distinct = set(names)
    special = any(value is not None for value in options.values())
    if len(distinct) < FEWEST or special or x.dim() != 3 or not _is_uniform(layer, distinct):
        return plain(x, *given, adapter_names=adapter_names, **options)
    result = layer.base_layer(x, *given)
    first_BRI = torch.stack([layer.lora_A[name].weight for name in names])
    second_BOR = torch.stack([layer.lora_B[name].weight for name in names])
    scales = [layer.scaling[name] for name in names]
    scale_B11 = torch.tensor(scales, device=x.device, dtype=first_BRI.dtype)[:, None, None]
    whole = len(names) == len(adapter_names)
    places = [place for place, name in enumerate(adapter_names) if name != BASE and name in layer.lora_A]
    x_BTI = (x if whole else x[places]).to(first_BRI.dtype)
    added_BTO = torch.bmm(torch.bmm(x_BTI, first_BRI.mT), second_BOR.mT) * scale_B11
    if whole:
        return result + added_BTO.to(result.dtype)
    result[places] += added_BTO.to(result.dtype)
    return result


def _is_uniform(layer: Any, names: set[str]) -> bool:
    """Return True when these adapters have one rank, and nothing beside their two matrices."""
    ranks = {layer.lora_A[name].weight.shape[0] for name in names}
    others = any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in names)
    return len(ranks) == 1 and not others
