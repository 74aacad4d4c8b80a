"""The training loop: deterministic, interruptible, and exact when resumed.

One optimizer step, as ``Training._step`` takes it:

    order      rows of the step, from the seed and the step's number alone             batches.py
    gradient   micro-batches through the model: packed attention, summed loss/tokens   gradient.py attention.py loss.py
    clip       the whole gradient scaled down to max_grad_norm                         optimizer.py
    check      loss and norm finite, or the run stops with its weights as they were    here
    update     AdamW at the step's learning rate                                       optimizer.py, schedule.py
    report     metrics, with the eval loss where one is due                            evaluation.py
    save       weights, optimizer, random generators, losses measured so far           checkpoint.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.digests import digest_of
from posttrain.engine.arithmetic import Arithmetic, choose_arithmetic
from posttrain.engine.attention import causal_model, install, rehearse
from posttrain.engine.batches import RowOrder
from posttrain.engine.checkpoint import CheckpointFolder, Position, capture, restore
from posttrain.engine.config import FineTuneConfig
from posttrain.engine.evaluation import Evaluation
from posttrain.engine.fused import unfuse
from posttrain.engine.gradient import add_gradient, trained_tokens
from posttrain.engine.optimizer import clip_gradient, make_optimizer, update_weights
from posttrain.engine.precision import computing_in
from posttrain.engine.schedule import Schedule
from posttrain.errors import Interrupted, require_finite
from posttrain.stage import Progress
from posttrain.tokens.packing import PackedRow


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the loop. ``model`` is trained in place; every row needs at least one trained token."""

    model: PreTrainedModel | PeftModel
    rows: Sequence[PackedRow]
    config: FineTuneConfig
    seed: int
    dtype: str
    """Number format of the stored weights: ``float32`` or ``bfloat16``."""
    progress: Progress
    stop_requested: Callable[[], bool]
    """Asked after every step; true saves and stops."""
    checkpoints: Path
    evaluation: Evaluation
    """Measures the eval loss, without a trace in the training."""
    without_gradient: dict[str, int] = field(default_factory=dict, init=False)
    """Parameters that were to be trained, but never got a gradient, with their sizes; filled in by ``run``."""

    def run(self) -> Position:
        """Train to the end, from the newest checkpoint if there is one.

        Equal inputs give equal weights, byte for byte, on one machine with one number of threads, however often the
        run is interrupted. Raises Interrupted when a stop is requested, with a checkpoint of the last step;
        Diverged when a loss or gradient is not finite, before it reaches a weight; OSError on a full disk.
        """
        with self._prepared():
            return self._train()

    def _train(self) -> Position:
        optimizer = make_optimizer(self.model, self.config)
        # The caller's random numbers are left as they were. Ours begin at the seed, or at the checkpoint's state:
        # dropout and NEFTune draw the same numbers whether the run was interrupted or not.
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            saved = CheckpointFolder(self.checkpoints, self._identity(), self.progress.note)
            position = self._resume(saved, optimizer)
            self.progress.start(self.order.total, position.step)
            if position.step == 0 and (metrics := self._evaluate(0)):
                self.progress.step(0, metrics)
            while position.step < self.order.total:
                position = self._step(position.step + 1, optimizer)
                self._save_or_stop(position, saved, optimizer)
        # AdamW keeps averages of those alone that got one
        trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        idle = {name: each.numel() for name, each in trained.items() if not optimizer.state.get(each)}
        self.without_gradient.update(idle)
        return position

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> Position:
        """Take optimizer step ``step``, counted from 1, and report it."""
        rows = [self.rows[index] for index in self.order.of_step(step)]
        # Counted before the first forward pass, over all micro-batches of the step: each adds its summed loss divided
        # by this number, so that every trained token weighs the same. A mean of the micro-batches' means would weigh
        # the tokens of sparsely trained rows more, and change with the size of a micro-batch.
        trained = trained_tokens(rows)
        rate = Schedule.from_config(self.config, self.order.total).rate(step)
        report = partial(self.progress.part, what="row")
        loss = add_gradient(self.model, rows, trained, self.config, self.compute_dtype, report)
        norm = clip_gradient(self.model, self.config.max_grad_norm)
        # Both, and before the update: a finite loss can have an infinite gradient, and clipping by an infinite or NaN
        # norm makes every gradient 0 or NaN. Adam's averages would never lose a NaN again.
        self._require_finite(step, "loss", loss)
        self._require_finite(step, "gradient norm", norm)
        update_weights(optimizer, rate)
        tokens = sum(len(row.input_ids) for row in rows)
        metrics = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}
        # The loss was taken before the update, the eval loss after it.
        self.progress.step(step, metrics | self._evaluate(step))
        return Position(step=step, loss=loss)

    @property
    def order(self) -> RowOrder:
        """The rows of each step."""
        return RowOrder.from_config(self.config, len(self.rows), self.seed)

    @property
    def compute_dtype(self) -> str:
        """Number format of the arithmetic."""
        return self.arithmetic.dtype

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic: as the recipe has it, or as measured."""
        return choose_arithmetic(self.config, self.dtype, self.model, self.checkpoints / "arithmetic.json")

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Give the model the arithmetic and the layers of training; in the end, its own forward passes and format."""
        with computing_in(self.model, self.compute_dtype):
            self.progress.note(f"arithmetic: {self.arithmetic}")
            self.progress.note(f"attention: {install(self.model, self.config.packing)}")
            if self.config.gradient_checkpointing:
                self._recompute_activations()
            self.model.train()
            try:
                rehearse(self.model)
                yield
            finally:
                unfuse(self.model)

    def _recompute_activations(self) -> None:
        causal = causal_model(self.model)
        if causal.supports_gradient_checkpointing:
            causal.activation_checkpointing_enable()
        else:
            self.progress.note(f"gradient checkpointing: {type(causal).__name__} does not support it, so it is off")

    def _identity(self) -> str:
        """Return the digest of all that decides the course of the run: a checkpoint with another is not resumed."""
        rows = sha256()
        for row in [*self.rows, *self.evaluation.rows]:
            rows.update(row.input_ids.tobytes() + row.mask.tobytes() + repr(row.lengths).encode())
        settings = {key: str(value) for key, value in asdict(self.config).items()}
        return digest_of(
            {"rows": rows.hexdigest(), "settings": settings, "seed": self.seed, "dtype": self.compute_dtype}
        )

    def _resume(self, saved: CheckpointFolder, optimizer: torch.optim.Optimizer) -> Position:
        """Restore the newest checkpoint, if there is one.

        Resuming is exact because a step depends on nothing else: rows and rate follow from its number, the gradient
        from the weights and random generators, the update from the optimizer's averages. All of these are restored.
        """
        if (found := saved.newest()) is None:
            return Position(step=0, loss=math.nan)
        position, state = found
        restore(self.model, optimizer, state)
        self.evaluation.restore(state)
        return position

    def _evaluate(self, step: int) -> dict[str, float]:
        """Measure the eval loss after ``step``, if it is due there."""
        if not self.evaluation.is_due(step, self.order):
            return {}
        report = partial(self.progress.part, what="eval document")
        metrics = self.evaluation.measure(step, self.model, self.compute_dtype, report)
        self._require_finite(step, "eval loss", metrics["eval_loss"])
        return metrics

    def _require_finite(self, step: int, name: str, value: float) -> None:
        fix = f"Lower lr (now {self.config.lr:g}) or raise warmup_ratio (now {self.config.warmup_ratio:g})"
        require_finite(step, name, value, fix)

    def _save_or_stop(self, position: Position, saved: CheckpointFolder, optimizer: torch.optim.Optimizer) -> None:
        # the last step is not saved: its weights are about to be published, and a stop has nothing left to save
        if position.step == self.order.total:
            return
        stopped = self.stop_requested()
        # After the step's report, so that metrics.jsonl never lags behind a checkpoint: on resuming, lines beyond the
        # checkpoint are dropped, but missing ones would be lost. The gradients are freed by now, and no part of it.
        if stopped or position.step % self.config.checkpoint_steps == 0:
            saved.save(position, capture(self.model, optimizer) | self.evaluation.state())
        if stopped:
            raise Interrupted(
                f"stopped after step {position.step} of {self.order.total}; run the same command to resume from there"
            )
