"""The gradient of one optimizer step, for the loop and for its proof."""

# T = tokens of the batch, D = width

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """Count the targets among the tokens of ``rows``, the divisor of a step's loss."""
    return sum(int(row.mask.sum()) for row in rows)


def add_gradient(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[PackedRow],
    trained: int,
    config: FineTuneConfig,
    dtype: str,
    report: Callable[[int, int], None] | None = None,
) -> float:
    """Add the gradient of the summed loss of ``rows`` / ``trained`` to the parameters; return that loss.

    ``trained`` counts the trained tokens of the whole optimizer step; ``rows`` may be a part of it. The rows go
    through the model ``config.per_device_batch_size`` at a time. ``dtype`` is ``float32`` or ``bfloat16``.
    ``report`` gets the number of rows done and their total after each batch.
    """
    causal = causal_model(model)
    head = OutputHead.of(causal)
    size = config.per_device_batch_size
    total = torch.zeros((), dtype=torch.float64)  # float64: the reported loss must not depend on the cut
    for start in range(0, len(rows), size):
        batch = Batch.of(rows[start : start + size], causal.device)
        noise = noisy_embeddings(causal, batch.lengths, config.neftune_alpha)
        with noise, autocasting(model, dtype):
            hidden_TD = packed_hidden(causal, batch.ids, batch.lengths)
            # logits are computed for trained positions alone: prompts cost no row of the vocabulary's width
            loss = summed_cross_entropy(
                head, hidden_TD.index_select(0, batch.trained), batch.targets, config.loss_chunk
            )
        # divided by the whole step's tokens before the backward pass, so that micro-batches simply add up
        (loss / trained).backward()
        total += loss.detach().cpu()
        if report is not None:
            report(min(start + size, len(rows)), len(rows))
    return float(total) / trained
