"""TRL's trainers on our token ids: an independent computation of every loss, gradient and step."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import Trainer

with contextlib.redirect_stdout(io.StringIO()):  # some libraries print while they are imported
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.experimental.utils import DPODataCollatorWithPadding
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

TALKATIVE = ("accelerate", "bitsandbytes", "datasets", "peft", "transformers", "trl")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, and log lines below ERROR of TRL and the libraries under it, inside the context."""
    with warnings.catch_warnings(), contextlib.ExitStack() as undo:
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, TALKATIVE):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


class Rows(Dataset):
    """Rows of token ids, with nothing left to map: no template, no tokenizer, no end token."""

    def map(self, *unused: Any, **unused_too: Any) -> Rows:
        """Return the rows unchanged."""
        return self


class Oracle(Trainer):
    """Base before one of TRL's trainers: token ids in, nothing sent."""

    configuration: ClassVar[Any]
    options: ClassVar[dict[str, Any]] = {"max_length": None, "router_aux_loss_coef": 0.0}

    def batch_of(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        """Return rows as one padded batch."""
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch: dict[str, torch.Tensor] = self._prepare_inputs(self.data_collator(examples))
        return batch

    def _prepare_dataset(self, dataset: Dataset, *unused: Any) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _save_checkpoint(self, *unused: Any, **unused_too: Any) -> None:
        """Save nothing."""


class PairOracle(Oracle, DPOTrainer):
    configuration = DPOConfig
    collator = DataCollatorForPreference


class JudgedOracle(Oracle, KTOTrainer):
    configuration = KTOConfig
    collator = DataCollatorForUnpairedPreference
    options: ClassVar[dict[str, Any]] = {**Oracle.options, "train_sampling_strategy": "sequential"}


class PairCollator:
    """Padded batches of prompt and answer, in which the labels of the prompt are masked."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad = DPODataCollatorWithPadding(pad_token_id=pad_token_id)

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> Any:
        """Pad the pairs of a batch."""
        return self.pad([_whole(example) for example in examples])


class FreeOracle(Oracle):
    """Base before TRL's trainers without a reference: the likelihood is that of the answers, as in the papers."""

    collator = PairCollator
    options: ClassVar[dict[str, Any]] = {"max_length": 256}

    def concatenated_forward(self, model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """Run TRL's forward pass with the likelihood of the answers alone: its ORPO scores the prompt, too."""
        chosen, rejected, chosen_logits, rejected_logits, _, *more = super().concatenated_forward(model, batch)
        tokens = (batch["chosen_labels"][:, 1:] != -100).sum(-1)
        summed = chosen * tokens if getattr(self, "loss_type", "orpo") in ("orpo", "ipo", "simpo") else chosen
        return chosen, rejected, chosen_logits, rejected_logits, -summed.sum() / tokens.sum(), *more


class OddsOracle(FreeOracle, ORPOTrainer):
    configuration = ORPOConfig


class ContrastOracle(FreeOracle, CPOTrainer):
    configuration = CPOConfig


ORACLES: Mapping[str, Any] = {
    "dpo": PairOracle,
    "kto": JudgedOracle,
    "orpo": OddsOracle,
    "cpo": ContrastOracle,
    "simpo": ContrastOracle,
}


def build(
    stage: str, policy: Any, reference: Any, rows: Sequence[Any], tokenizer: Any, folder: Path, **args: Any
) -> Any:
    """A trainer of TRL for the ``rows`` of a stage as one batch; ``args`` are those of its configuration."""
    kind = ORACLES[stage]
    given = {} if reference is None else {"ref_model": reference}
    settings = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": len(rows), "gradient_accumulation_steps": 1, "max_steps": 1}
    settings |= {
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    with quiet():
        return kind(
            model=policy,
            **given,
            args=kind.configuration(**settings, **kind.options, **args),
            train_dataset=Rows.from_dict(columns(stage, rows)),
            data_collator=kind.collator(pad_token_id=tokenizer.pad_token_id or 0),
            processing_class=tokenizer,
        )


def frozen_copy(policy: Any) -> Any:
    """A reference of its own, without peft's wrapper: TRL would compute with another output layer."""
    copied = copy.deepcopy(policy)
    model = copied.get_base_model() if hasattr(copied, "get_base_model") else copied
    return model.requires_grad_(False).eval()


def columns(stage: str, rows: Sequence[Any]) -> dict[str, list[Any]]:
    """The columns of TRL's collators."""
    found: dict[str, list[Any]] = {"prompt_ids": [list(row.prompt) for row in rows]}
    if stage != "kto":
        sides = {"chosen_ids": [list(row.chosen) for row in rows]}
        return found | sides | {"rejected_ids": [list(row.rejected) for row in rows]}
    found |= {"completion_ids": [list(row.completion) for row in rows], "label": [row.label for row in rows]}
    return found | ({"KL_completion_ids": [list(row.aside) for row in rows]} if rows[0].aside else {})


def _whole(example: Mapping[str, list[int]]) -> dict[str, list[int]]:
    prompt = example["prompt_ids"]
    whole: dict[str, list[int]] = {}
    for side in ("chosen", "rejected"):
        ids = prompt + example[f"{side}_ids"]
        whole[f"{side}_input_ids"] = ids
        whole[f"{side}_attention_mask"] = [1] * len(ids)
        whole[f"{side}_labels"] = [-100] * len(prompt) + example[f"{side}_ids"]
    return whole
