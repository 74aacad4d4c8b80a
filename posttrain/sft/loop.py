"""The training loop of supervised fine-tuning: deterministic, interruptible, and exact when continued."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.artifact import digest_of
from posttrain.data.packing import PackedRow
from posttrain.errors import ArtifactDamaged, Interrupted
from posttrain.sft.attention import causal_model, install, packed_hidden
from posttrain.sft.batches import Batch, RowOrder
from posttrain.sft.checkpoint import CheckpointFolder, Position, capture, restore
from posttrain.sft.config import SFTConfig
from posttrain.sft.loss import OutputHead, summed_cross_entropy
from posttrain.sft.schedule import Schedule, make_optimizer
from posttrain.stage import Progress


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of the loop. ``model`` is trained in place; every row needs at least one trained token."""

    model: PreTrainedModel | PeftModel
    rows: Sequence[PackedRow]
    config: SFTConfig
    seed: int
    dtype: str
    """``float32`` or ``bfloat16``."""
    progress: Progress
    stop_requested: Callable[[], bool]
    """Asked after every step: whether to save and stop."""
    checkpoints: Path

    def run(self) -> Position:
        """Train to the end, from the newest checkpoint if there is one.

        Equal inputs give equal weights, byte for byte, on one machine with one number of threads, however often the
        run is interrupted. Raises Interrupted when a stop is requested, with a checkpoint of the last step;
        ArtifactDamaged when a loss or gradient is not finite, before it reaches a weight; OSError on a full disk.
        """
        install(self.model)
        self._prepare()
        optimizer = make_optimizer((p for p in self.model.parameters() if p.requires_grad), self.config)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            saved = CheckpointFolder(self.checkpoints, self._identity(), self.progress.note)
            position = self._resume(saved, optimizer)
            self.progress.start(self.order.total, position.step)
            while position.step < self.order.total:
                position = self._step(position.step + 1, optimizer)
                self._save_or_stop(position, saved, optimizer)
        return position

    @property
    def order(self) -> RowOrder:
        """Which rows each step trains on."""
        return RowOrder.from_config(self.config, len(self.rows), self.seed)

    def _prepare(self) -> None:
        if self.config.gradient_checkpointing:
            causal_model(self.model).activation_checkpointing_enable()
        self.model.train()

    def _identity(self) -> str:
        rows = sha256()
        for row in self.rows:
            rows.update(row.input_ids.tobytes() + row.mask.tobytes() + repr(row.lengths).encode())
        settings = {key: str(value) for key, value in asdict(self.config).items()}
        return digest_of({"rows": rows.hexdigest(), "settings": settings, "seed": self.seed, "dtype": self.dtype})

    def _resume(self, saved: CheckpointFolder, optimizer: torch.optim.Optimizer) -> Position:
        if (found := saved.newest()) is None:
            return Position(step=0, loss=math.nan)
        position, state = found
        restore(self.model, optimizer, state)
        return position

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> Position:
        rows = [self.rows[index] for index in self.order.of_step(step)]
        trained = sum(int(row.mask.sum()) for row in rows)
        rate = Schedule.from_config(self.config, self.order.total).rate(step)
        loss = self._accumulate(rows, trained)
        norm = self._clip()
        self._check_finite(step, loss, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(row.input_ids) for row in rows)
        metrics = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}
        self.progress.step(step, metrics)
        return Position(step=step, loss=loss)

    def _accumulate(self, rows: Sequence[PackedRow], trained: int) -> float:
        """Add the gradient of the mean loss over the ``trained`` tokens of ``rows``; returns that loss."""
        causal = causal_model(self.model)
        head = OutputHead.of(causal)
        size = self.config.per_device_batch_size
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(rows), size):
            batch = Batch.of(rows[start : start + size], causal.device)
            with self._precision(causal.device):
                hidden_TD = packed_hidden(causal, batch.ids, batch.lengths)
                loss = summed_cross_entropy(
                    head, hidden_TD.index_select(0, batch.trained), batch.targets, self.config.loss_chunk
                )
            (loss / trained).backward()
            total += loss.detach().cpu()
        return float(total) / trained

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast for full fine-tuning in bfloat16, whose weights are float32; adapters have a bfloat16 base."""
        if self.dtype == "bfloat16" and not isinstance(self.model, PeftModel):
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _clip(self) -> float:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise ArtifactDamaged(
                    f"training diverged at step {step}: the {name} is {value}. Nothing was published. "
                    f"Lower lr (now {self.config.lr:g}) or raise warmup_ratio (now {self.config.warmup_ratio:g})"
                )

    def _save_or_stop(self, position: Position, saved: CheckpointFolder, optimizer: torch.optim.Optimizer) -> None:
        if position.step == self.order.total:
            return
        stopped = self.stop_requested()
        if stopped or position.step % self.config.checkpoint_steps == 0:
            saved.save(position, capture(self.model, optimizer))
        if stopped:
            raise Interrupted(
                f"stopped after step {position.step} of {self.order.total}; the same command goes on from there"
            )
