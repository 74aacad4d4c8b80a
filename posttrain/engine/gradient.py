"""The gradient of one optimizer step: what the loop trains with, and what its proof measures."""

# T = tokens of the batch, D = width

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.engine.attention import causal_model, packed_hidden
from posttrain.engine.batches import Batch
from posttrain.engine.config import FineTuneConfig
from posttrain.engine.loss import OutputHead, summed_cross_entropy
from posttrain.engine.neftune import noisy_embeddings
from posttrain.engine.precision import autocasting
from posttrain.tokens.packing import PackedRow


def trained_tokens(rows: Sequence[PackedRow]) -> int:
    """Tokens of ``rows`` that are targets: what the loss of a step is divided by."""
    return sum(int(row.mask.sum()) for row in rows)


def add_gradient(
    model: PreTrainedModel | PeftModel, rows: Sequence[PackedRow], trained: int, config: FineTuneConfig, dtype: str
) -> float:
    """Add the gradient of the summed loss of ``rows`` over ``trained`` to the parameters; returns that loss.

    ``trained`` counts the trained tokens of the whole optimizer step, of which ``rows`` may be a part. The rows go
    through the model ``config.per_device_batch_size`` at a time. ``dtype`` is ``float32`` or ``bfloat16``.
    """
    causal = causal_model(model)
    head = OutputHead.of(causal)
    size = config.per_device_batch_size
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), size):
        batch = Batch.of(rows[start : start + size], causal.device)
        noise = noisy_embeddings(causal, batch.lengths, config.neftune_alpha)
        with noise, autocasting(model, dtype):
            hidden_TD = packed_hidden(causal, batch.ids, batch.lengths)
            loss = summed_cross_entropy(
                head, hidden_TD.index_select(0, batch.trained), batch.targets, config.loss_chunk
            )
        (loss / trained).backward()
        total += loss.detach().cpu()
    return float(total) / trained
