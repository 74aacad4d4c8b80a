"""What the trainers of all preference stages share: they are fed token ids, and write nothing but our checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer

from posttrain import StageContext, require_finite
from posttrain_preference import checkpoint
from posttrain_preference.callbacks import Reporting, Stopping, step_metrics


class TokenDataset(Dataset):
    """Rows that are token ids already, so that there is nothing to map: no template, no tokenizer, no end token."""

    def map(self, *unused: Any, **unused_too: Any) -> TokenDataset:
        """The rows as they are."""
        return self


class StageTrainer(Trainer, ABC):
    """Put before one of TRL's trainers: token ids in, exact checkpoints, our schedule, no telemetry."""

    masks: ClassVar[Sequence[str]] = ("attention_mask",)
    """Entries of a batch that mark the tokens which are seen."""
    ref_model: Any = None
    lr_scheduler: Any

    def __init__(self, *args: Any, warmup_ratio: float, **kwargs: Any) -> None:
        self.warmup_ratio = warmup_ratio
        self.tokens = 0
        given = {name: parameter.data for name, parameter in checkpoint.trained(kwargs["model"]).items()}
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        for name, parameter in checkpoint.trained(self.model).items():
            # TRL rounds the adapters of a quantised model to bfloat16: it would leave the reference at once, and small
            # updates would be lost
            parameter.data = given[name]

    def batch_of(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The batch that training makes of ``rows``, on the training device."""
        columns = self.columns(rows)
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch: dict[str, torch.Tensor] = self._prepare_inputs(self.data_collator(examples))
        return batch

    @abstractmethod
    def columns(self, rows: Sequence[Any]) -> dict[str, list[Any]]:
        """The columns of ``rows`` that this trainer's collator reads."""

    def reference_log_probs(self, row: Any) -> list[float]:
        """Log-probability of each answer of ``row`` under the reference, as this trainer computes it."""
        return [found.item() for found in self.compute_ref_log_probs(self.ref_model, self.batch_of([row]))]

    def loss_of(self, rows: Sequence[Any]) -> float:
        """The loss of ``rows`` as one batch."""
        with torch.no_grad(), self.accelerator.autocast():
            return float(self.compute_loss(self.model, self.batch_of(rows)))

    def figures(self) -> dict[str, Any]:
        """What the manifest tells about the training."""
        last = [entry for entry in self.state.log_history if "loss" in entry][-1]
        margin = {name: value for name, value in step_metrics(last).items() if name == "rewards_margin"}
        return {"steps": self.state.global_step, "final_loss": last["loss"], **margin, "tokens": self.tokens}

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any, **more: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch; raises Diverged at once when the loss is not finite."""
        self.tokens += sum(int(inputs[name].sum()) for name in self.masks)
        loss: torch.Tensor = super().training_step(model, inputs, *rest, **more)
        require_finite(self.state.global_step + 1, "loss", loss.item())
        return loss

    def log(self, logs: dict[str, float], *rest: Any, **more: Any) -> None:
        """Log with the number of tokens seen so far."""
        super().log(logs | {"tokens": self.tokens}, *rest, **more)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear warm-up, then linear decay; no step has rate 0, as the first has in transformers' own."""
        rate = partial(_relative_rate, int(self.warmup_ratio * num_training_steps), num_training_steps)
        scheduler = LambdaLR(optimizer or self.optimizer, rate)
        self.lr_scheduler = scheduler
        return scheduler

    def _prepare_dataset(self, dataset: Dataset, *unused: Any) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # after the last step the result itself is saved
            folder = Path(self.args.output_dir)
            checkpoint.save(folder, self.model, self.optimizer, self.lr_scheduler, self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_weights(Path(resume_from_checkpoint), self.model)
        self.tokens = checkpoint.seen_tokens(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        if path is not None:
            checkpoint.load_optimizer(Path(path), self.optimizer, self.lr_scheduler)


def connections(context: StageContext, policy: Any) -> dict[str, Any]:
    """What every trainer is given besides its rows and its configuration."""
    return {
        "model": policy,
        "warmup_ratio": context.config.warmup_ratio,
        "processing_class": context.tokenizer(),
        "callbacks": [Reporting(context.progress), Stopping(context.stop_requested)],
    }


def arguments(context: StageContext, policy: Any) -> dict[str, Any]:
    """The part of TRL's configuration that all stages share."""
    settings = context.config
    on_cpu = context.device().type == "cpu"
    return {
        "output_dir": str(context.checkpoints),
        "beta": settings.beta,
        "learning_rate": settings.lr,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.per_device_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "bf16": uses_autocast(context, policy),
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "seed": context.seed,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
    }


def uses_autocast(context: StageContext, policy: Any) -> bool:
    """Whether to compute in bfloat16 on float32 weights; the base under an adapter is bfloat16 itself."""
    return context.dtype == "bfloat16" and not isinstance(policy, PeftModel)


def _relative_rate(warmup: int, total: int, done: int) -> float:
    """Learning rate of the step after ``done`` steps, relative to the peak."""
    return (done + 1) / warmup if done < warmup else (total - done) / (total - warmup)
