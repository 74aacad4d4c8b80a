"""The training loop of supervised fine-tuning: deterministic, interruptible, and exact when continued."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.digests import digest_of
from posttrain.engine.attention import causal_model, install
from posttrain.engine.batches import RowOrder
from posttrain.engine.checkpoint import CheckpointFolder, Position, capture, restore
from posttrain.engine.config import FineTuneConfig
from posttrain.engine.evaluation import Evaluation
from posttrain.engine.fused import unfuse
from posttrain.engine.gradient import add_gradient, trained_tokens
from posttrain.engine.precision import compute_dtype, computing_in
from posttrain.engine.schedule import Schedule, make_optimizer
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
    """Number format in which the weights are stored: ``float32`` or ``bfloat16``."""
    progress: Progress
    stop_requested: Callable[[], bool]
    """Asked after every step: whether to save and stop."""
    checkpoints: Path
    evaluation: Evaluation
    """Measures the held-out loss, without a trace in what is trained."""

    def run(self) -> Position:
        """Train to the end, from the newest checkpoint if there is one.

        Equal inputs give equal weights, byte for byte, on one machine with one number of threads, however often the
        run is interrupted. Raises Interrupted when a stop is requested, with a checkpoint of the last step;
        Diverged when a loss or gradient is not finite, before it reaches a weight; OSError on a full disk.
        """
        with self._prepared():
            return self._train()

    def _train(self) -> Position:
        optimizer = make_optimizer((p for p in self.model.parameters() if p.requires_grad), self.config)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            saved = CheckpointFolder(self.checkpoints, self._identity(), self.progress.note)
            position = self._resume(saved, optimizer)
            self.progress.start(self.order.total, position.step)
            if position.step == 0 and (metrics := self._evaluated(0)):
                self.progress.step(0, metrics)
            while position.step < self.order.total:
                position = self._step(position.step + 1, optimizer)
                self._save_or_stop(position, saved, optimizer)
        return position

    @property
    def order(self) -> RowOrder:
        """Which rows each step trains on."""
        return RowOrder.from_config(self.config, len(self.rows), self.seed)

    @property
    def compute_dtype(self) -> str:
        """Number format of the arithmetic."""
        return compute_dtype(self.config, self.dtype, self.model)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The model as steps compute with it, and in the end as anyone else does."""
        with computing_in(self.model, self.compute_dtype):
            self.progress.note(f"arithmetic: {self.compute_dtype} on weights stored as {self.dtype}")
            self.progress.note(f"attention: {install(self.model)}")
            if self.config.gradient_checkpointing:
                causal_model(self.model).activation_checkpointing_enable()
            self.model.train()
            try:
                yield
            finally:
                unfuse(self.model)

    def _identity(self) -> str:
        rows = sha256()
        for row in [*self.rows, *self.evaluation.rows]:
            rows.update(row.input_ids.tobytes() + row.mask.tobytes() + repr(row.lengths).encode())
        settings = {key: str(value) for key, value in asdict(self.config).items()}
        return digest_of(
            {"rows": rows.hexdigest(), "settings": settings, "seed": self.seed, "dtype": self.compute_dtype}
        )

    def _resume(self, saved: CheckpointFolder, optimizer: torch.optim.Optimizer) -> Position:
        if (found := saved.newest()) is None:
            return Position(step=0, loss=math.nan)
        position, state = found
        restore(self.model, optimizer, state)
        self.evaluation.restore(state)
        return position

    def _evaluated(self, step: int) -> dict[str, float]:
        """The held-out loss after ``step``, when it is due there."""
        if not self.evaluation.is_due(step, self.order):
            return {}
        metrics = self.evaluation.measure(step, self.model, self.compute_dtype)
        self._check_finite(step, metrics["eval_loss"], name="held-out loss")
        return metrics

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> Position:
        rows = [self.rows[index] for index in self.order.of_step(step)]
        trained = trained_tokens(rows)
        rate = Schedule.from_config(self.config, self.order.total).rate(step)
        loss = add_gradient(self.model, rows, trained, self.config, self.compute_dtype)
        norm = self._clip()
        self._check_finite(step, loss, name="loss")
        self._check_finite(step, norm, name="gradient norm")
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(row.input_ids) for row in rows)
        metrics = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}
        self.progress.step(step, metrics | self._evaluated(step))
        return Position(step=step, loss=loss)

    def _clip(self) -> float:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))

    def _check_finite(self, step: int, value: float, *, name: str) -> None:
        fix = f"Lower lr (now {self.config.lr:g}) or raise warmup_ratio (now {self.config.warmup_ratio:g})"
        require_finite(step, name, value, fix)

    def _save_or_stop(self, position: Position, saved: CheckpointFolder, optimizer: torch.optim.Optimizer) -> None:
        if position.step == self.order.total:
            return
        stopped = self.stop_requested()
        if stopped or position.step % self.config.checkpoint_steps == 0:
            saved.save(position, capture(self.model, optimizer) | self.evaluation.state())
        if stopped:
            raise Interrupted(
                f"stopped after step {position.step} of {self.order.total}; the same command goes on from there"
            )
