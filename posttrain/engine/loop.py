"""The training loop: deterministic, interruptible, and exact when resumed.

One optimizer step, as ``Training._step`` takes it:

    order      rows of the step, from the seed and the step's number alone             batches.py
    gradient   micro-batches through the model: packed attention, summed loss/tokens   gradient.py attention.py loss.py
    sum        over all processes, if there are several                                engine.py ddp.py fsdp.py zero.py
    clip       the whole gradient scaled down to max_grad_norm                         optimizer.py
    check      loss and norm finite, or the run stops with its weights as they were    here
    update     AdamW at the step's learning rate                                       optimizer.py, schedule.py
    report     metrics, with the eval loss where one is due                            evaluation.py
    save       weights, optimizer, random generators, losses measured so far           saves.py, checkpoint.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.config.schema import WITHOUT_EFFECT
from posttrain.digests import digest_of
from posttrain.engine import processes
from posttrain.engine.ahead import prepared_ahead
from posttrain.engine.arithmetic import Arithmetic, choose_arithmetic
from posttrain.engine.attention import causal_model, install, rehearse
from posttrain.engine.batches import RowOrder, rows_per_batch
from posttrain.engine.checkpoint import CheckpointFolder, Position
from posttrain.engine.config import LoopConfig
from posttrain.engine.ddp import Replicated
from posttrain.engine.engine import DDP, DEEPSPEED, FSDP, SINGLE, Engine, Single
from posttrain.engine.evaluation import Evaluation
from posttrain.engine.fsdp import Sharded
from posttrain.engine.fused import unfuse
from posttrain.engine.gradient import MaskedCrossEntropy, StepBatches, add_shares
from posttrain.engine.objective import Objective
from posttrain.engine.precision import autocasting
from posttrain.engine.saves import Saves
from posttrain.engine.schedule import Schedule
from posttrain.engine.throughput import Throughput
from posttrain.engine.units import reject_lone_documents
from posttrain.engine.zero import Partitioned
from posttrain.errors import Interrupted, require_finite
from posttrain.stage import Progress
from posttrain.tokens.packing import PackedRows

ENGINES: Mapping[str, type[Single]] = {SINGLE: Single, DDP: Replicated, FSDP: Sharded, DEEPSPEED: Partitioned}
"""Every engine by its name."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the loop. ``model`` is trained in place; every row needs at least one trained token."""

    model: PreTrainedModel | PeftModel
    rows: Sequence[Any]
    config: LoopConfig
    seed: int
    dtype: str
    """Number format of the stored weights: ``float32`` or ``bfloat16``."""
    progress: Progress
    stop_requested: Callable[[], bool]
    """Asked after every step; true saves and stops."""
    checkpoints: Path
    evaluation: Evaluation
    """Measures on records set aside, without a trace in the training."""
    engine: str = SINGLE
    """Name of the engine; with several processes, each runs the loop."""
    make_objective: Callable[[LoopConfig, str], Objective[Any]] = MaskedCrossEntropy
    """Returns the loss, from the settings and the number format of the arithmetic."""
    without_gradient: dict[str, int] = field(default_factory=dict, init=False)
    """Parameters that were to be trained, but never got a gradient, with their sizes; filled in by ``run``."""
    last: dict[str, float] = field(default_factory=dict, init=False)
    """Figures of the loss in the last step; filled in by ``run``."""

    def run(self) -> Position:
        """Train to the end, from the newest checkpoint if there is one.

        Equal inputs give equal weights, byte for byte, on one machine with one number of threads, however often the
        run is interrupted. Raises Interrupted when a stop is requested, with a checkpoint of the last step;
        Diverged when a loss or gradient is not finite, before it reaches a weight; OSError on a full disk.
        """
        with self._prepared() as engine:
            self.objective.begin(engine)
            return self._train(engine)

    def _train(self, engine: Engine) -> Position:
        # The caller's random numbers are left as they were. Ours begin at the seed, or at the checkpoint's state:
        # dropout and NEFTune draw the same numbers whether the run was interrupted or not.
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            saved = CheckpointFolder(self.checkpoints, self._identity(), self.progress.note)
            position = self._resume(saved, engine)
            rate = None if self.throughput is None else self.throughput.rate
            self.progress.start(self.order.total, position.step, rate)
            if position.step == 0 and (metrics := self._evaluate(0, engine)):
                self.progress.step(0, metrics)
            saves = Saves(saved, self.config)
            steps = range(position.step + 1, self.order.total + 1)
            device = causal_model(self.model).device
            ahead = torch.device("cpu") if self.objective.drawn else device  # rows that the model draws wait for it
            with saves.ended(), prepared_ahead(partial(self._batches, device), steps, ahead) as prepared:
                for step, batches in zip(steps, prepared, strict=True):
                    position = self._step(step, batches, engine)
                    self._save_or_stop(position, saves, engine)
        self.without_gradient.update(engine.idle())
        return position

    def _rows(self, step: int) -> Sequence[Any]:
        return self.objective.draw(step, [self.rows[index] for index in self.order.of_step(step)])

    def _batches(self, device: torch.device, step: int) -> StepBatches:
        """Lay out the rows of a step."""
        rows, size = self._rows(step), rows_per_batch(self.config, processes.world())
        cut = [rows[start : start + size] for start in range(0, len(rows), size)]
        # totals before the first forward pass, over the whole step
        return StepBatches.of(self.objective, cut, self.objective.totals(rows), device)

    def _step(self, step: int, batches: StepBatches, engine: Engine) -> Position:
        """Take optimizer step ``step``, counted from 1, and report it."""
        totals = batches.totals
        rate = Schedule.from_config(self.config, self.order.total).rate(step)
        report = partial(self.progress.part, what="row")
        seeds = partial(_seed_of, self.seed, step) if processes.world() > 1 else None
        figures = self.objective.figures(add_shares(engine, self.objective, batches, report, seeds), totals)
        # Both, and before the update: a finite loss can have an infinite gradient, and clipping by an infinite or NaN
        # norm makes every gradient 0 or NaN. Adam's averages would never lose a NaN again.
        self._require_finite(step, "loss", figures["loss"])
        check = partial(self._require_finite, step, "gradient norm")
        norm = engine.step(rate, self.config.max_grad_norm, check)
        self.last.clear()
        self.last.update(figures)
        metrics = {"loss": figures["loss"], "lr": rate, "grad_norm": norm, **figures, **totals, **self._work(step)}
        # The loss was taken before the update, the eval loss after it.
        self.progress.step(step, metrics | self._evaluate(step, engine))
        return Position(step=step, loss=figures["loss"])

    @cached_property
    def objective(self) -> Objective[Any]:
        """The loss."""
        return self.make_objective(self.config, self.compute_dtype)

    @property
    def order(self) -> RowOrder:
        """The rows of each step."""
        return RowOrder.from_config(self.config, len(self.rows), self.seed, self.objective.shuffled)

    @property
    def compute_dtype(self) -> str:
        """Number format of the arithmetic."""
        return self.arithmetic.dtype

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """The arithmetic: as the recipe has it, or as measured."""
        if processes.rank() > 0:
            processes.wait()  # process 0 measures; the others read what it recorded
        found = choose_arithmetic(self.config, self.dtype, self.model, self.checkpoints / "arithmetic.json")
        if processes.rank() == 0:
            processes.wait()
        return found

    @cached_property
    def throughput(self) -> Throughput | None:
        """The yardstick of the speed, in process 0; first asked for while the weights are whole and others wait."""
        found = Throughput.of(self.model, self.config, self.arithmetic) if processes.rank() == 0 else None
        processes.wait()
        return found

    def _work(self, step: int) -> dict[str, float]:
        if self.throughput is None:
            return {}
        return {"model_flops": self.throughput.operations.of(self.objective.work(self._rows(step)))}

    @contextmanager
    def _prepared(self) -> Iterator[Engine]:
        """Give the model the arithmetic, the layers and the engine of training; in the end, its own layers and format.

        Weights that were sliced stay so: nothing needs them whole.
        """
        engine: Engine = ENGINES[self.engine](self.model, self.config)
        if self.throughput is not None:
            rate = f"{self.throughput.rate / 1e9:,.0f} GFLOP/s"
            self.progress.note(f"speed: mfu is the share of {rate}, measured in products of the model's shapes")
        with engine.prepared(self.arithmetic):
            self.progress.note(f"arithmetic: {self.arithmetic}")
            with autocasting(self.model, self.compute_dtype):  # kernels are chosen by the arithmetic
                choice = engine.run(partial(install, self.model, self.config.packing))
            if self.engine in (FSDP, DEEPSPEED):
                reject_lone_documents(causal_model(self.model), choice.kernel, self.engine)
            self.progress.note(f"attention: {choice}")
            if self.config.gradient_checkpointing:
                self._recompute_activations()
            self.model.train()
            try:
                with autocasting(self.model, self.compute_dtype):
                    rehearse(self.model, engine.accumulate)
                yield engine
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
        for each in (self.rows, self.evaluation.rows):
            for content in [each.content()] if isinstance(each, PackedRows) else map(self.objective.content, each):
                rows.update(content)
        settings = {key: str(value) for key, value in asdict(self.config).items() if key not in WITHOUT_EFFECT}
        return digest_of(
            {"rows": rows.hexdigest(), "settings": settings, "seed": self.seed, "dtype": self.compute_dtype}
        )

    def _resume(self, saved: CheckpointFolder, engine: Engine) -> Position:
        """Restore the newest checkpoint, if there is one.

        Resuming is exact because a step depends on nothing else: rows and rate follow from its number, the gradient
        from the weights and random generators, the update from the optimizer's averages. All of these are restored.
        """
        if (found := saved.newest()) is None:
            return Position(step=0, loss=math.nan)
        position, state = found
        engine.restore(state)
        self.evaluation.restore(state)
        return position

    def _evaluate(self, step: int, engine: Engine) -> dict[str, float]:
        """Measure the eval loss after ``step``, if it is due there."""
        if not self.evaluation.is_due(step, self.order):
            return {}
        report = partial(self.progress.part, what="eval document")
        metrics = self.evaluation.measure(step, engine, self.compute_dtype, report)
        for name, value in metrics.items():
            self._require_finite(step, name.replace("_", " "), value)
        return metrics

    def _require_finite(self, step: int, name: str, value: float) -> None:
        fix = f"Lower lr (now {self.config.lr:g}) or raise warmup_ratio (now {self.config.warmup_ratio:g})"
        require_finite(step, name, value, fix)

    def _save_or_stop(self, position: Position, saves: Saves, engine: Engine) -> None:
        # The last step is not saved: its weights are about to be published, and a stop has nothing left to save. Nor is
        # one amid several on the same rows: what the model has drawn for them, it would draw otherwise now.
        if position.step == self.order.total or position.step % self.order.visits:
            return
        due = processes.rank() == 0 and saves.is_due(position.step)  # clocks differ: process 0 has the word
        asked = torch.tensor([self.stop_requested(), due, saves.failed]).int()
        stopped, saved, failed = map(bool, processes.total(asked).tolist())
        if failed:
            saves.finish()
            raise Interrupted("another process could not write its part of a checkpoint")
        # After the step's report, so that metrics.jsonl never lags behind a checkpoint: on resuming, lines beyond the
        # checkpoint are dropped, but missing ones would be lost. The gradients are freed by now, and no part of it.
        if stopped or saved:
            measured = self.evaluation.state() if processes.rank() == 0 else {}
            saves.begin(position, engine.capture() | measured)
        if stopped:
            saves.finish()
            processes.wait()
            raise Interrupted(f"stopped after step {position.step} of {self.order.total}")


def _seed_of(seed: int, step: int, batch: int) -> int:
    """Return the seed of the random numbers of one batch, equal on any number of processes."""
    return int(digest_of([seed, step, batch])[:15], 16)
