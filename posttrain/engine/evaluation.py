"""The eval loss, on documents set aside from training: normalised as in training, judged by their own noise.

    eval_loss = summed loss of all trained tokens of the whole set / trained tokens of the whole set

It is a mean over tokens, never of means over batches: the cut into batches does not matter. The sums are
kept per document: each time the same documents are measured, and their paired differences tell a rise from noise.
"""

# T = tokens of a batch, N = trained tokens of a batch, C = trained tokens of a chunk, V = vocabulary, D = documents

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.engine import processes
from posttrain.engine.attention import causal_model, packed_hidden
from posttrain.engine.batches import Batch, RowOrder, deal
from posttrain.engine.checkpoint import State
from posttrain.engine.config import LoopConfig
from posttrain.engine.engine import Engine
from posttrain.engine.loss import OutputHead
from posttrain.engine.precision import autocasting
from posttrain.model.device import exact
from posttrain.tokens.best_fit import best_fit
from posttrain.tokens.packing import PackedRow

NOISE = 2.0
"""Least size of a difference of two losses, in standard errors, to count as one."""

NEGLIGIBLE = 0.01
"""Share of a loss that is too small a rise for a warning, however certain."""
KINDS = ("refusals", "answers")


@dataclass(frozen=True)
class Measured:
    """The losses of the eval documents at one step."""

    step: int
    sums: torch.Tensor
    """Summed loss of each document, [D] in float64."""


@dataclass(frozen=True)
class Difference:
    """The difference of a loss between two steps, over the same documents."""

    value: float
    error: float
    """Standard error of ``value`` as an estimate for other documents; infinite for a single one."""

    @property
    def rises(self) -> bool:
        """True when the loss is higher than before by more than noise."""
        return self.value > NOISE * self.error

    @property
    def falls(self) -> bool:
        """True when the loss is lower than before by more than noise."""
        return self.value < -NOISE * self.error


@dataclass(kw_only=True)
class Evaluation:
    """Measures the eval loss while a model is trained; without rows, never."""

    BEST: ClassVar[str] = "lowest"
    """Word for the best measurement in checkpoints."""
    rows: Sequence[PackedRow]
    """One document each, with at least one trained token; refusals come last."""
    refusals: int
    """Number of refusals at their end."""
    config: LoopConfig
    first: Measured | None = field(default=None, init=False)
    best: Measured | None = field(default=None, init=False)
    last: Measured | None = field(default=None, init=False)

    def is_due(self, step: int, order: RowOrder) -> bool:
        """Return true where a measurement is due: before the first step, every ``eval_steps``, after the last."""
        every = self.config.eval_steps or order.steps_per_epoch
        return self.is_asked and (step % every == 0 or step == order.total)

    @property
    def is_asked(self) -> bool:
        """True with something to measure."""
        return bool(self.rows)

    def measure(
        self,
        step: int,
        engine: Engine,
        dtype: str,
        report: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """Measure the engine's model after ``step`` and return the losses by name.

        Model and random numbers stay as they are.
        """
        last = self.note(Measured(step, self.losses(engine, dtype, report)))
        return {name: self._loss(last, part) for name, part in self._parts().items()}

    def note(self, measured: Measured) -> Measured:
        """Keep a measurement as the last one, and as the first or the best one if it is; return it."""
        self.last = measured
        self.first = self.first or measured
        if self.best is None or self.is_better(measured, self.best):
            self.best = measured
        return measured

    def is_better(self, one: Measured, other: Measured) -> bool:
        """Return true when the loss of ``one`` is lower."""
        return bool(one.sums.sum() < other.sums.sum())

    def losses(self, engine: Engine, dtype: str, report: Callable[[int, int], None] | None = None) -> torch.Tensor:
        """Return the summed loss of each document, [D] in float64."""
        return document_losses(engine, self.rows, self.config, dtype, report)

    def difference(self, before: Measured, after: Measured, part: slice = slice(None)) -> Difference:
        """Return the change of the loss of the documents in ``part``, with the standard error of a ratio of sums."""
        tokens_D = self._tokens()[part]
        change_D = (after.sums - before.sums)[part]
        count = len(tokens_D)
        value = float(change_D.sum() / tokens_D.sum())
        if count < 2:
            return Difference(value, math.inf)
        # A ratio of two sums over documents, change and tokens, and the documents are the independent draws: the error
        # follows from each document's residual (linearised ratio estimator; Cochran, Sampling Techniques, ch. 6).
        spread = float((change_D - value * tokens_D).square().sum()) * count / (count - 1)
        return Difference(value, math.sqrt(spread) / float(tokens_D.sum()))

    def figures(self) -> dict[str, int | float]:
        """Return the eval figures of the manifest; empty when nothing was measured."""
        if self.first is None or self.best is None or self.last is None:
            return {}
        losses = {name: self._loss(self.last, part) for name, part in self._parts().items()}
        return losses | {
            "eval_loss_first": self._loss(self.first),
            "eval_loss_lowest": self._loss(self.best),
            "eval_loss_lowest_step": self.best.step,
            "eval_documents": len(self.rows),
            "eval_trained_tokens": int(self._tokens().sum()),
        }

    def warnings(self) -> list[str]:
        """Return warnings of overfitting and of declining too much."""
        if self.first is None or self.best is None or self.last is None:
            return []
        return [*self._overfitting(self.best, self.last), *self._overdeclining(self.first, self.last)]

    def state(self) -> State:
        """Return the measurements to keep in a checkpoint."""
        # copies: safetensors saves no tensors that share memory, as these do when the first loss is the lowest
        kept = {"first": self.first, self.BEST: self.best}
        state: State = {f"evaluation/{name}": each.sums.clone() for name, each in kept.items() if each is not None}
        if self.best is not None:
            state[f"evaluation/{self.BEST}_step"] = torch.tensor(self.best.step)
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the measurements of ``state``."""
        if "evaluation/first" in state:
            self.first = Measured(0, state["evaluation/first"])
            self.best = Measured(int(state[f"evaluation/{self.BEST}_step"]), state[f"evaluation/{self.BEST}"])

    def _overfitting(self, lowest: Measured, last: Measured) -> list[str]:
        rise = self.difference(lowest, last)
        if not rise.rises or rise.value < NEGLIGIBLE * self._loss(lowest):
            return []
        place = f"it was lowest at step {lowest.step} ({self._loss(lowest):.4f})"
        fix = f"Train for fewer epochs (max_steps={lowest.step} ends there), or lower lr" if lowest.step else "Lower lr"
        change = f"{self._loss(last):.4f} at step {last.step} is higher by {rise.value:.4f} ± {rise.error:.4f}"
        return [f"overfitting by the eval loss: {place}; {change}. {fix}"]

    def _overdeclining(self, first: Measured, last: Measured) -> list[str]:
        parts = self._parts()
        if "eval_loss_refusals" not in parts:
            return []
        refusals, answers = (self.difference(first, last, parts[f"eval_loss_{kind}"]) for kind in KINDS)
        if not (refusals.falls and answers.rises):
            return []
        change = f"fell by {-refusals.value:.4f} on refusals and rose by {answers.value:.4f} on other answers"
        return [f"the eval loss {change}: the model learns to decline. Lower the share of refusals in data"]

    def _parts(self) -> dict[str, slice]:
        """Return the documents of each loss by its name: all; with both kinds, also refusals and answers apart."""
        answers = len(self.rows) - self.refusals
        apart = {"eval_loss_refusals": slice(answers, None), "eval_loss_answers": slice(answers)}
        return {"eval_loss": slice(None), **(apart if answers and self.refusals else {})}

    def _tokens(self) -> torch.Tensor:
        """Return the trained tokens of each document, [D]."""
        return torch.tensor([int(row.mask.sum()) for row in self.rows], dtype=torch.float64)

    def _loss(self, measured: Measured, part: slice = slice(None)) -> float:
        return float(measured.sums[part].sum() / self._tokens()[part].sum())


@torch.no_grad()
def document_losses(
    engine: Engine,
    rows: Sequence[PackedRow],
    config: LoopConfig,
    dtype: str,
    report: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return the summed loss of the trained tokens of each row, [D] in float64 on the CPU, in evaluation mode.

    The rows share forward passes, up to as many tokens as one of training, and the processes share the passes.
    ``dtype`` is ``float32`` or ``bfloat16``. ``report`` gets the number of documents done and their total after each.
    """
    training = engine.model.training
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    engine.model.eval()
    # Documents do not see each other, so they can share rows in any grouping: best fit takes the fewest forward passes.
    # The sums are float64, because the differences of interest are small against them.
    groups = best_fit([len(row.input_ids) for row in rows], config.sequence_length * config.per_device_batch_size)
    done = 0
    for index, counts in deal(len(groups), processes.rank(), processes.world()):
        chosen = [rows[each] for each in groups[index]]
        losses_N = engine.run(partial(_trained_losses, engine.model, chosen, config, dtype))
        tokens_D = torch.tensor([int(row.mask.sum()) for row in chosen])
        owner_N = torch.repeat_interleave(torch.tensor(groups[index]), tokens_D)
        if counts:
            found.append((owner_N, losses_N))
        done = min(done + len(chosen) * processes.world(), len(rows))
        if report is not None:
            report(done, len(rows))
    engine.model.train(training)
    sums_D = torch.zeros(len(rows), dtype=torch.float64)
    for owner_N, losses_N in found:  # only here, so that no pass waits for the one before it
        sums_D.index_add_(0, owner_N, exact(losses_N).cpu())
    return processes.total(sums_D)


def _trained_losses(
    model: PreTrainedModel | PeftModel, rows: Sequence[PackedRow], config: LoopConfig, dtype: str
) -> torch.Tensor:
    """Return -log p of each trained token of ``rows``, [N]."""
    causal = causal_model(model)
    batch = Batch.of(rows, causal.device)
    with autocasting(model, dtype):
        hidden_TD = packed_hidden(causal, batch.ids, batch.lengths)
        hidden_ND = hidden_TD.index_select(0, batch.trained)
        return _token_losses(OutputHead.of(causal), hidden_ND, batch.targets, config.loss_chunk)


def _token_losses(head: OutputHead, hidden_ND: torch.Tensor, targets_N: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return -log p(target) of each trained token, [N], holding at most ``chunk`` rows of logits at once."""
    pieces = zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    return torch.cat([F.cross_entropy(head.logits(h_CD), t_C, reduction="none") for h_CD, t_C in pieces])
