"""The gradient of one optimizer step, for the loop and for its proof; SFT's loss among the objectives."""

# T = tokens of the batch, N = trained tokens of the batch, D = width

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.cost.operations import Work
from posttrain.engine import processes
from posttrain.engine.attention import causal_model, packed_hidden
from posttrain.engine.batches import Batch, deal
from posttrain.engine.config import LoopConfig
from posttrain.engine.engine import Engine, Single
from posttrain.engine.loss import OutputHead, summed_cross_entropy
from posttrain.engine.neftune import noisy_embeddings
from posttrain.engine.objective import Objective, Sums, Totals
from posttrain.engine.precision import autocasting
from posttrain.tokens.packing import PackedRow


@dataclass(frozen=True)
class MaskedCrossEntropy:
    """The cross-entropy of the trained tokens of packed rows, as a mean over those of the whole step."""

    config: LoopConfig
    dtype: str
    """Number format of the arithmetic: ``float32`` or ``bfloat16``."""
    coupled = False
    shuffled = True

    def begin(self, engine: Engine) -> None:
        """Do nothing: the loss needs no model but the one that is trained."""

    def totals(self, rows: Sequence[PackedRow]) -> Totals:
        """Count all tokens, and the trained ones, which divide the loss."""
        # Counted over all micro-batches and processes of the step: each adds its summed loss divided by this number, so
        # that every trained token weighs the same. A mean of the micro-batches' means would weigh the tokens of
        # sparsely trained rows more, and change with the size of a micro-batch.
        return {"tokens": sum(len(row.input_ids) for row in rows), "trained_tokens": trained_tokens(rows)}

    def work(self, rows: Sequence[PackedRow]) -> Sequence[Work]:
        """Return the documents of ``rows``."""
        documents = [(length, ()) for row in rows for length in row.lengths]
        return [Work(families=documents, scored=trained_tokens(rows))]

    def share(
        self, model: PreTrainedModel | PeftModel, rows: Sequence[PackedRow], totals: Totals
    ) -> tuple[torch.Tensor, Sums]:
        """Return the summed loss of ``rows``, divided by the trained tokens of the step."""
        causal = causal_model(model)
        batch = Batch.of(rows, causal.device)
        noise = noisy_embeddings(causal, batch.lengths, self.config.neftune_alpha)
        with noise, autocasting(model, self.dtype):
            hidden_TD = packed_hidden(causal, batch.ids, batch.lengths)
            # logits are computed for trained positions alone: prompts cost no row of the vocabulary's width
            hidden_ND = hidden_TD.index_select(0, batch.trained)
            loss = summed_cross_entropy(OutputHead.of(causal), hidden_ND, batch.targets, self.config.loss_chunk)
        # divided by the whole step's tokens before the backward pass, so that micro-batches simply add up
        return loss / totals["trained_tokens"], {"loss": loss.detach()}

    def figures(self, sums: Mapping[str, float], totals: Totals) -> dict[str, float]:
        """Return the mean loss of the trained tokens."""
        return {"loss": sums["loss"] / totals["trained_tokens"]}

    def content(self, row: PackedRow) -> bytes:
        """Return tokens, mask and lengths."""
        return row.input_ids.tobytes() + row.mask.tobytes() + repr(row.lengths).encode()


def trained_tokens(rows: Sequence[PackedRow]) -> int:
    """Count the targets among the tokens of ``rows``, the divisor of a step's loss."""
    return sum(int(row.mask.sum()) for row in rows)


def add_gradient(
    model: PreTrainedModel | PeftModel, rows: Sequence[PackedRow], trained: int, config: LoopConfig, dtype: str
) -> float:
    """Add the gradient of the summed loss of ``rows`` / ``trained`` to the parameters; return that loss.

    ``trained`` counts the trained tokens of the whole optimizer step; ``rows`` may be a part of it. The rows go
    through the model ``config.per_device_batch_size`` at a time. ``dtype`` is ``float32`` or ``bfloat16``.
    """
    objective, size = MaskedCrossEntropy(config, dtype), config.per_device_batch_size
    totals = {"trained_tokens": trained}
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return objective.figures(add_shares(Single(model, config), objective, batches, totals), totals)["loss"]


def add_shares(
    engine: Engine,
    objective: Objective[Any],
    batches: Sequence[Sequence[Any]],
    totals: Totals,
    report: Callable[[int, int], None] | None = None,
    seeds: Callable[[int], int] | None = None,
) -> dict[str, float]:
    """Add the gradient of the loss of all ``batches`` to the parameters; return the sums over them, by name.

    Every process takes its own batches, and as many as each other: one with fewer repeats the first of the step, and
    takes it for nothing. ``report`` gets the number of rows done and their total after each batch. ``seeds`` are those
    of the random numbers of each batch; without them, the numbers run on from batch to batch.
    """
    shares = deal(len(batches), processes.rank(), processes.world())
    summed: Sums = {}
    done, rows = 0, sum(map(len, batches))
    for turn, (index, counts) in enumerate(shares):
        if seeds is not None:
            torch.manual_seed(seeds(index))

        def compute(batch: Sequence[Any] = batches[index], counts: bool = counts) -> tuple[torch.Tensor, Sums]:
            loss, sums = objective.share(engine.model, batch, totals)
            return (loss, sums) if counts else (loss * 0, {name: value * 0 for name, value in sums.items()})

        found = engine.accumulate(compute, last=turn == len(shares) - 1)
        for name, value in found.items():  # float64: the reported loss must not depend on the cut
            summed[name] = summed[name] + value.double() if name in summed else value.double()
        done = min(done + len(batches[index]) * processes.world(), rows)
        if report is not None:
            report(done, rows)
    return processes.totals(summed)
