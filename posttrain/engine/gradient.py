"""The gradient of one optimizer step, for the loop and for its proof; SFT's loss among the objectives."""

# T = tokens of the batch, N = trained tokens of the batch, D = width

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.cost.operations import Work
from posttrain.engine import processes
from posttrain.engine.attention import causal_model, packed_hidden, shared_hidden, shares_prompts
from posttrain.engine.batches import Batch, Layout, deal, rows_per_batch
from posttrain.engine.config import LoopConfig
from posttrain.engine.engine import Engine, Single
from posttrain.engine.loss import OutputHead, summed_cross_entropy
from posttrain.engine.neftune import noisy_embeddings
from posttrain.engine.objective import Objective, Sums, Totals
from posttrain.engine.precision import autocasting
from posttrain.model.device import exact
from posttrain.tokens.packing import PackedRow


@dataclass
class MaskedCrossEntropy:
    """The cross-entropy of the trained tokens of packed rows, as a mean over those of the whole step."""

    config: LoopConfig
    dtype: str
    """Number format of the arithmetic: ``float32`` or ``bfloat16``."""
    shared: bool = field(default=False, init=False)
    """True when documents that begin alike share the tokens of their beginning."""
    coupled = False
    shuffled = True
    drawn = False

    def draw(self, step: int, rows: Sequence[PackedRow]) -> Sequence[PackedRow]:
        """Return ``rows``."""
        return rows

    def begin(self, engine: Engine) -> None:
        """Find out, on the model, if beginnings can be shared; noise and dropout are drawn for each document."""
        dropout = any(isinstance(each, torch.nn.Dropout) and each.p > 0 for each in engine.model.modules())
        drawn = dropout or bool(self.config.neftune_alpha)
        self.shared = not drawn and engine.run(partial(shares_prompts, engine.model))

    def totals(self, rows: Sequence[PackedRow]) -> Totals:
        """Count all tokens, and the trained ones, which divide the loss."""
        # Counted over all micro-batches and processes of the step: each adds its summed loss divided by this number, so
        # that every trained token weighs the same. A mean of the micro-batches' means would weigh the tokens of
        # sparsely trained rows more, and change with the size of a micro-batch.
        return {"tokens": sum(len(row.input_ids) for row in rows), "trained_tokens": trained_tokens(rows)}

    def work(self, rows: Sequence[PackedRow]) -> Sequence[Work]:
        """Return the documents of ``rows``, with what those of a batch share."""
        size = rows_per_batch(self.config, processes.world())
        layouts = [Layout.of(rows[start : start + size], self.shared) for start in range(0, len(rows), size)]
        documents = [each for one in layouts for each in one.families or [(length, ()) for length in one.lengths]]
        return [Work(families=documents, scored=trained_tokens(rows))]

    def batch(self, rows: Sequence[PackedRow], device: torch.device) -> Batch:
        """Return ``rows`` end to end."""
        return Batch.of(rows, device, self.shared)

    def share(self, model: PreTrainedModel | PeftModel, batch: Batch, totals: Totals) -> tuple[torch.Tensor, Sums]:
        """Return the summed loss of ``batch``, divided by the trained tokens of the step."""
        causal = causal_model(model)
        noise = noisy_embeddings(causal, batch.lengths, self.config.neftune_alpha)
        with noise, autocasting(model, self.dtype):
            if batch.families:
                hidden_TD = shared_hidden(causal, batch.ids, batch.families)
            else:
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
    cut = [rows[start : start + size] for start in range(0, len(rows), size)]
    step = StepBatches.of(objective, cut, {"trained_tokens": trained}, causal_model(model).device)
    return objective.figures(add_shares(Single(model, config), objective, step), step.totals)["loss"]


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """The batches of an optimizer step that this process takes, on its device."""

    totals: Totals
    """Counts over all rows of the step."""
    rows: int
    """Rows of the step."""
    dealt: Sequence[tuple[int, bool, int, Any]]
    """Each batch with its number in the step before it, True when it counts, and the number of its rows."""

    @classmethod
    def of(
        cls, objective: Objective[Any], cut: Sequence[Sequence[Any]], totals: Totals, device: torch.device
    ) -> StepBatches:
        """Return the batches of a step whose rows are ``cut`` into these.

        Every process takes as many as each other: one with fewer takes the first of the step, for nothing.
        """
        shares = deal(len(cut), processes.rank(), processes.world())
        dealt = [(index, counts, len(cut[index]), objective.batch(cut[index], device)) for index, counts in shares]
        return cls(totals=totals, rows=sum(map(len, cut)), dealt=dealt)


def add_shares(
    engine: Engine,
    objective: Objective[Any],
    step: StepBatches,
    report: Callable[[int, int], None] | None = None,
    seeds: Callable[[int], int] | None = None,
) -> dict[str, float]:
    """Add the gradient of the loss of all batches of ``step`` to the parameters; return the sums over them, by name.

    ``report`` gets the number of rows done and their total after each batch. ``seeds`` are those of the random numbers
    of each batch; without them, the numbers run on from batch to batch.
    """
    summed: Sums = {}
    done = 0
    for turn, (index, counts, size, batch) in enumerate(step.dealt):
        if seeds is not None:
            torch.manual_seed(seeds(index))

        def compute(batch: Any = batch, counts: bool = counts) -> tuple[torch.Tensor, Sums]:
            loss, sums = objective.share(engine.model, batch, step.totals)
            return (loss, sums) if counts else (loss * 0, {name: value * 0 for name, value in sums.items()})

        found = engine.accumulate(compute, last=turn == len(step.dealt) - 1)
        for name, value in found.items():  # float64: the reported loss must not depend on the cut
            summed[name] = summed[name] + exact(value) if name in summed else exact(value)
        done = min(done + size * processes.world(), step.rows)
        if report is not None:
            report(done, step.rows)
    return processes.totals(summed)
