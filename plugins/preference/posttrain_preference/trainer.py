"""TRL's trainers, fed with our token ids: exact checkpoints, our schedule, nothing else written or sent."""

# B = pairs of a batch, T = tokens, V = vocabulary

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from posttrain import StageContext, require_finite
from posttrain_preference import checkpoint
from posttrain_preference.callbacks import Reporting, Stopping, step_metrics
from posttrain_preference.config import PreferenceSettings
from posttrain_preference.feedback import TokenAnswer, feedback_columns
from posttrain_preference.pairs import TokenPair, pair_columns
from posttrain_preference.rows import TokenRows

Columns = dict[str, list[Any]]
"""A data set as TRL's collators read it: a list with an entry for each row, by the column's name."""


class TokenDataset(Dataset):
    """Rows of token ids, with nothing left to map: no template, no tokenizer, no end token."""

    def map(self, *unused: Any, **unused_too: Any) -> TokenDataset:
        """Return the rows unchanged."""
        return self


class StageTrainer(Trainer, ABC):
    """Base before one of TRL's trainers: token ids in, exact checkpoints, our schedule, no telemetry."""

    configuration: ClassVar[Any]
    """TRL's class of settings."""
    collator: ClassVar[Any]
    """Class that pads the rows of a batch."""
    masks: ClassVar[Sequence[str]] = ("attention_mask",)
    """Entries of a batch that mark the tokens the model sees."""
    ref_model: Any = None
    lr_scheduler: Any

    def __init__(self, *args: Any, settings: PreferenceSettings, **kwargs: Any) -> None:
        self.settings = settings
        self.tokens = 0
        given = {name: parameter.data for name, parameter in checkpoint.trained_parameters(kwargs["model"]).items()}
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        for name, parameter in checkpoint.trained_parameters(self.model).items():
            # TRL rounds the adapters of a quantised model to bfloat16: it would leave the reference at once, and small
            # updates would be lost
            parameter.data = given[name]

    @classmethod
    def row_arguments(cls, settings: PreferenceSettings) -> dict[str, Any]:
        """Return TRL's settings for rows that are final: nothing is cut, and no loss of a router is added."""
        return {"max_length": None, "router_aux_loss_coef": 0.0}

    @classmethod
    @abstractmethod
    def columns(cls, rows: Sequence[Any], settings: PreferenceSettings) -> Columns:
        """Return the columns of ``rows`` for this trainer's collator."""

    def batch_of(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return ``rows`` as one training batch, on the training device."""
        columns = self.columns(rows, self.settings)
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch: dict[str, torch.Tensor] = self._prepare_inputs(self.data_collator(examples))
        return batch

    def reference_log_probs(self, row: Any) -> list[float]:
        """Return the log-probability of each answer of ``row`` under the reference, as this trainer computes it."""
        return [found.item() for found in self.compute_ref_log_probs(self.ref_model, self.batch_of([row]))]

    def loss_of(self, rows: Sequence[Any]) -> float:
        """Return the loss of ``rows`` as one batch."""
        with torch.no_grad(), self.accelerator.autocast():
            return float(self.compute_loss(self.model, self.batch_of(rows)))

    def figures(self) -> dict[str, Any]:
        """Return the manifest's figures of the training."""
        last = [entry for entry in self.state.log_history if "loss" in entry][-1]
        margin = {name: value for name, value in step_metrics(last).items() if name == "rewards_margin"}
        return {"steps": self.state.global_step, "final_loss": last["loss"], **margin, "tokens": self.tokens}

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *rest: Any, **more: Any) -> torch.Tensor:
        """Take a micro-batch forward and backward; raises Diverged at once when its loss is not finite."""
        self.tokens += sum(int(inputs[name].sum()) for name in self.masks)
        loss: torch.Tensor = super().training_step(model, inputs, *rest, **more)
        require_finite(self.state.global_step + 1, "loss", loss.item())
        return loss

    def log(self, logs: dict[str, float], *rest: Any, **more: Any) -> None:
        """Log with the number of tokens seen so far."""
        super().log(logs | {"tokens": self.tokens}, *rest, **more)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Return a linear warm-up and decay; no step has rate 0, unlike the first of transformers' own."""
        warmup = int(self.settings.warmup_ratio * num_training_steps)
        rate = partial(_relative_rate, warmup, num_training_steps)
        scheduler = LambdaLR(optimizer or self.optimizer, rate)
        self.lr_scheduler = scheduler
        return scheduler

    def _prepare_dataset(self, dataset: Dataset, *unused: Any) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the use of its trainers."""

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


class PairTrainer(StageTrainer, DPOTrainer):
    """DPO on pairs of token ids."""

    configuration = DPOConfig
    collator = DataCollatorForPreference

    @classmethod
    def columns(cls, rows: Sequence[TokenPair], settings: PreferenceSettings) -> Columns:
        """Return prompt, chosen and rejected answer."""
        return pair_columns(rows)


class JudgedTrainer(StageTrainer, KTOTrainer):
    """KTO on judged answers as token ids, in the given order."""

    configuration = KTOConfig
    collator = DataCollatorForUnpairedPreference

    @classmethod
    def row_arguments(cls, settings: PreferenceSettings) -> dict[str, Any]:
        """Return TRL's settings for rows in their final order: it puts both labels into every batch."""
        return {**super().row_arguments(settings), "train_sampling_strategy": "sequential"}

    @classmethod
    def columns(cls, rows: Sequence[TokenAnswer], settings: Any) -> Columns:
        """Return prompt, answer and label, and for ``kto`` the answers to other prompts."""
        return feedback_columns(rows, settings.per_device_batch_size, settings.loss_type == "kto")

    def reference_log_probs(self, row: TokenAnswer) -> list[float]:
        """Return the log-probability of the one answer."""
        log_probs, _ = self.compute_ref_log_probs(self.ref_model, self.batch_of([row]))
        return [log_probs.item()]


class PairCollator:
    """Collator for padded batches of prompt and answer, in which the labels of the prompt are masked."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad = DPODataCollatorWithPadding(pad_token_id=pad_token_id)

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pad the pairs of a batch."""
        batch: dict[str, torch.Tensor] = self.pad([_whole(example) for example in examples])
        return batch


class FreeTrainer(StageTrainer):
    """Base before TRL's trainers without a reference: exact masks and log-probabilities."""

    collator = PairCollator
    masks = ("chosen_attention_mask", "rejected_attention_mask")

    @classmethod
    def row_arguments(cls, settings: PreferenceSettings) -> dict[str, Any]:
        """Return TRL's settings for rows up to the sequence length: without one, these trainers assume 512."""
        return {"max_length": settings.sequence_length}

    @classmethod
    def columns(cls, rows: Sequence[TokenPair], settings: PreferenceSettings) -> Columns:
        """Return prompt, chosen and rejected answer."""
        return pair_columns(rows)

    def loss_of(self, rows: Sequence[TokenPair]) -> float:
        """Return the loss of ``rows`` as one batch, without counting it among the figures of a step."""
        loss = super().loss_of(rows)
        self._stored_metrics.clear()
        return loss

    def get_batch_logps(self, logits: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        """Return TRL's log-probabilities of float32 logits: in bfloat16 the sum over an answer is off by whole nats."""
        log_probs_2B: torch.Tensor = super().get_batch_logps(logits.float(), *rest, **more)
        return log_probs_2B  # 2B: the chosen answers, then the rejected ones

    def concatenated_forward(self, model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Run TRL's forward pass, with the likelihood of the answers alone in float32.

        TRL's ORPO scores the prompt too.
        """
        chosen_B, rejected_B, chosen_logits_BTV, rejected_logits_BTV, _, *more = super().concatenated_forward(
            model, batch
        )
        tokens_B = (batch["chosen_labels"][:, 1:] != -100).sum(-1)
        summed_B = chosen_B * tokens_B if self.per_token else chosen_B
        nll = -summed_B.sum() / tokens_B.sum()
        return chosen_B, rejected_B, chosen_logits_BTV, rejected_logits_BTV, nll, *more

    @property
    @abstractmethod
    def per_token(self) -> bool:
        """True when the loss compares log-probabilities per token, not of whole answers."""


class OddsTrainer(FreeTrainer, ORPOTrainer):
    """ORPO on pairs of token ids."""

    configuration = ORPOConfig

    @property
    def per_token(self) -> bool:
        """Always: the odds are of tokens."""
        return True


class ContrastTrainer(FreeTrainer, CPOTrainer):
    """CPO and SimPO on pairs of token ids."""

    configuration = CPOConfig

    @property
    def per_token(self) -> bool:
        """As TRL decides by the loss."""
        return self.loss_type in ("ipo", "simpo")


def build_trainer(
    kind: type[StageTrainer], context: StageContext, rows: TokenRows[Any], policy: Any, reference: Any
) -> StageTrainer:
    """Return a trainer of ``policy``, against the model ``reference`` where the loss has one."""
    settings: PreferenceSettings = context.config
    tokenizer = context.tokenizer()
    given = {} if reference is None else {"ref_model": reference}
    return kind(
        settings=settings,
        model=policy,
        **given,
        args=kind.configuration(
            **_arguments(context, policy), **settings.loss_arguments(), **kind.row_arguments(settings)
        ),
        train_dataset=TokenDataset.from_dict(kind.columns(rows.rows, settings)),
        data_collator=kind.collator(pad_token_id=tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        callbacks=[Reporting(context.progress), Stopping(context.stop_requested)],
    )


def uses_autocast(context: StageContext, policy: Any) -> bool:
    """Return True to compute in bfloat16 on float32 weights; the base under an adapter is bfloat16 itself."""
    return context.dtype == "bfloat16" and not isinstance(policy, PeftModel)


def _arguments(context: StageContext, policy: Any) -> dict[str, Any]:
    """Return the part of TRL's configuration that all methods share."""
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


def _relative_rate(warmup: int, total: int, done: int) -> float:
    """Return the learning rate of the step after ``done`` steps, relative to the peak."""
    return (done + 1) / warmup if done < warmup else (total - done) / (total - warmup)


def _whole(example: Mapping[str, list[int]]) -> dict[str, list[int]]:
    prompt = example["prompt_ids"]
    whole: dict[str, list[int]] = {}
    for side in ("chosen", "rejected"):
        ids = prompt + example[f"{side}_ids"]
        whole[f"{side}_input_ids"] = ids
        whole[f"{side}_attention_mask"] = [1] * len(ids)
        whole[f"{side}_labels"] = [-100] * len(prompt) + example[f"{side}_ids"]
    return whole
