"""TRL's DPO trainer, fed with our token ids and kept from writing anything but our checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from posttrain import ArtifactDamaged, Progress, StageContext
from posttrain_preference import checkpoint
from posttrain_preference.pairs import TokenPair, TokenPairs


class PairTrainer(DPOTrainer):
    """DPO on pairs that are token ids already."""

    lr_scheduler: Any

    def __init__(self, *args: Any, warmup_ratio: float, **kwargs: Any) -> None:
        self.warmup_ratio = warmup_ratio
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *unused: Any) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def batch_of(self, rows: Sequence[TokenPair]) -> dict[str, torch.Tensor]:
        """The batch that training makes of ``rows``, on the training device."""
        columns = TokenPairs(rows=list(rows)).columns()
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch: dict[str, torch.Tensor] = self._prepare_inputs(self.data_collator(examples))
        return batch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch; raises ArtifactDamaged at once when the loss is not finite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        _require_finite("loss", loss.item(), self.state.global_step + 1)
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear warm-up, then linear decay; no step has rate 0, as the first has in transformers' own."""
        rate = partial(_relative_rate, int(self.warmup_ratio * num_training_steps), num_training_steps)
        scheduler = LambdaLR(optimizer or self.optimizer, rate)
        self.lr_scheduler = scheduler
        return scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # after the last step the result itself is saved
            folder = Path(self.args.output_dir)
            checkpoint.save(folder, self.model, self.optimizer, self.lr_scheduler, self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_weights(Path(resume_from_checkpoint), self.model)
        self._total_train_tokens = checkpoint.seen_tokens(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        if path is not None:
            checkpoint.load_optimizer(Path(path), self.optimizer, self.lr_scheduler)


class Reporting(TrainerCallback):
    """Hands every optimizer step to the pipeline's progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Announce the steps."""
        self.tokens = int(state.log_history[-1]["num_tokens"]) if state.log_history else 0
        self.progress.start(state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **unused: Any) -> None:
        """Report one step; raises ArtifactDamaged when its gradient is not finite."""
        if "loss" not in logs:
            return  # TRL's summary of the whole run
        _require_finite("gradient norm", logs["grad_norm"], state.global_step)
        seen = int(logs["num_tokens"])
        self.progress.step(state.global_step, step_metrics(logs) | {"tokens": seen - self.tokens})
        self.tokens = seen


class Stopping(TrainerCallback):
    """Ends training with a checkpoint after the step in which a stop was asked for."""

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        self.stop_requested = stop_requested

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> Any:
        """Ask for both when a stop was requested."""
        if self.stop_requested():
            control.should_save = control.should_training_stop = True
        return control


def step_metrics(logs: Mapping[str, float]) -> dict[str, float]:
    """TRL's figures of one step under our names; margins and accuracies are means over the step's pairs."""
    names = {
        "loss": "loss",
        "lr": "learning_rate",
        "grad_norm": "grad_norm",
        "rewards_margin": "rewards/margins",
        "rewards_accuracy": "rewards/accuracies",
    }
    return {ours: logs[theirs] for ours, theirs in names.items()}


def build_trainer(context: StageContext, pairs: TokenPairs, policy: Any, reference: Any | None) -> PairTrainer:
    """A trainer of ``policy`` against ``reference``, or else against a frozen copy of its adapter, named ``ref``."""
    tokenizer = context.tokenizer()
    trainer = PairTrainer(
        model=policy,
        ref_model=reference,
        args=_arguments(context, uses_autocast(context, policy)),
        warmup_ratio=context.config.warmup_ratio,
        train_dataset=Dataset.from_dict(pairs.columns()),
        processing_class=tokenizer,
        data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id or 0),
        callbacks=[Reporting(context.progress), Stopping(context.stop_requested)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def uses_autocast(context: StageContext, policy: Any) -> bool:
    """Whether to compute in bfloat16 on float32 weights; the base under an adapter is bfloat16 itself."""
    return context.dtype == "bfloat16" and not isinstance(policy, PeftModel)


def _arguments(context: StageContext, autocast: bool) -> DPOConfig:
    settings = context.config
    on_cpu = context.device().type == "cpu"
    return DPOConfig(
        output_dir=str(context.checkpoints),
        beta=settings.beta,
        learning_rate=settings.lr,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.per_device_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=None,
        bf16=autocast,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        seed=context.seed,
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
    )


def _relative_rate(warmup: int, total: int, done: int) -> float:
    """Learning rate of the step after ``done`` steps, relative to the peak."""
    return (done + 1) / warmup if done < warmup else (total - done) / (total - warmup)


def _require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise ArtifactDamaged(
            f"training diverged at step {step}: the {what} is {value}. Nothing was published. "
            "Lower lr or raise warmup_ratio"
        )
