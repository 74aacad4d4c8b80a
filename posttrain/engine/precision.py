"""A model in the number format of its arithmetic, not always the one of its stored weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.engine.attention import causal_model
from posttrain.model.loading import DTYPES

FLOAT32, BFLOAT16 = "float32", "bfloat16"


@contextmanager
def computing_in(model: PreTrainedModel | PeftModel, dtype: str) -> Iterator[None]:
    """Hold the frozen weights of ``model`` as ``dtype``, and in the end as before: each bfloat16 is a float32, too.

    Trained weights are float32 anyway; quantised weights stay as they are.
    """
    frozen = [] if is_quantised(model) else [each for each in model.parameters() if not each.requires_grad]
    stored = {parameter: parameter.dtype for parameter in frozen}
    for parameter in stored:
        parameter.data = parameter.data.to(DTYPES[dtype])
    try:
        yield
    finally:
        for parameter in model.parameters():  # an engine may have put slices in the place of others
            if parameter in stored:
                parameter.data = parameter.data.to(stored[parameter])


def autocasting(model: PreTrainedModel | PeftModel, dtype: str) -> AbstractContextManager[Any]:
    """Compute in bfloat16 on float32 weights, where every weight is trained in ``dtype`` bfloat16; else do nothing."""
    # AdamW's steps are smaller than what bfloat16 resolves, so trained weights are float32; an adapter's base is frozen
    # and held in the format of the arithmetic already
    if dtype == BFLOAT16 and not isinstance(model, PeftModel):
        return torch.autocast(model.device.type, dtype=torch.bfloat16)
    return nullcontext()


def is_quantised(model: PreTrainedModel | PeftModel) -> bool:
    """Return True for a model in 4 bits, whose format of computing is part of its quantisation."""
    return bool(getattr(causal_model(model), "is_quantized", False))
