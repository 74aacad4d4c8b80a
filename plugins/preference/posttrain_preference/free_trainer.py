"""TRL's ORPO and CPO trainers, which need no reference, fed with our token ids."""

# B = pairs, 2B = their chosen answers, then their rejected ones; T = tokens, V = vocabulary

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding

from posttrain import StageContext
from posttrain_preference.pairs import TokenPair, pair_columns
from posttrain_preference.rows import TokenRows
from posttrain_preference.trainer import StageTrainer, TokenDataset, arguments, connections


class FreeTrainer(StageTrainer):
    """Put before TRL's trainers without a reference: exact masks and log-probabilities."""

    masks = ("chosen_attention_mask", "rejected_attention_mask")

    def columns(self, rows: Sequence[TokenPair]) -> dict[str, list[Any]]:
        """Prompt, chosen and rejected answer."""
        return pair_columns(rows)

    def loss_of(self, rows: Sequence[TokenPair]) -> float:
        """The loss of ``rows`` as one batch; it does not count as a step's."""
        loss = super().loss_of(rows)
        self._stored_metrics.clear()
        return loss

    def get_batch_logps(self, logits: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        """TRL's log-probabilities, from logits in float32: a sum over an answer in bfloat16 is off by whole nats."""
        log_probs_2B: torch.Tensor = super().get_batch_logps(logits.float(), *rest, **more)
        return log_probs_2B

    def concatenated_forward(self, model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """TRL's forward pass with the likelihood of the answers alone, in float32: TRL's ORPO scores the prompt too."""
        chosen_B, rejected_B, chosen_logits, rejected_logits, _, *more = super().concatenated_forward(model, batch)
        tokens_B = (batch["chosen_labels"][:, 1:] != -100).sum(-1)
        summed_B = chosen_B * tokens_B if self.per_token else chosen_B
        return chosen_B, rejected_B, chosen_logits, rejected_logits, -summed_B.sum() / tokens_B.sum(), *more

    @property
    @abstractmethod
    def per_token(self) -> bool:
        """Whether the loss compares log-probabilities per token, not of whole answers."""


class OddsTrainer(FreeTrainer, ORPOTrainer):
    """ORPO on pairs that are token ids already."""

    @property
    def per_token(self) -> bool:
        """The odds are of tokens."""
        return True


class ContrastTrainer(FreeTrainer, CPOTrainer):
    """CPO and SimPO on pairs that are token ids already."""

    @property
    def per_token(self) -> bool:
        """As TRL decides it."""
        return self.loss_type in ("ipo", "simpo")


class PairCollator:
    """Makes padded batches of prompt and answer, in which the labels of the prompt are masked."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad = DPODataCollatorWithPadding(pad_token_id=pad_token_id)

    def __call__(self, examples: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pad the pairs of a batch."""
        batch: dict[str, torch.Tensor] = self.pad([_whole(example) for example in examples])
        return batch


def build_orpo(context: StageContext, pairs: TokenRows[TokenPair], policy: Any, reference: None) -> OddsTrainer:
    """A trainer of ``policy`` with ORPO's loss."""
    config = ORPOConfig(**arguments(context, policy), max_length=context.config.sequence_length)
    return OddsTrainer(**_connections(context, pairs, policy), args=config)


def build_cpo(context: StageContext, pairs: TokenRows[TokenPair], policy: Any, reference: None) -> ContrastTrainer:
    """A trainer of ``policy`` with CPO's loss."""
    settings = context.config
    config = CPOConfig(
        **arguments(context, policy),
        max_length=settings.sequence_length,
        loss_type=settings.loss_type,
        label_smoothing=settings.label_smoothing,
        cpo_alpha=settings.cpo_alpha,
    )
    return ContrastTrainer(**_connections(context, pairs, policy), args=config)


def build_simpo(context: StageContext, pairs: TokenRows[TokenPair], policy: Any, reference: None) -> ContrastTrainer:
    """A trainer of ``policy`` with SimPO's loss."""
    settings = context.config
    config = CPOConfig(
        **arguments(context, policy),
        max_length=settings.sequence_length,
        loss_type="simpo",
        cpo_alpha=0.0,  # TRL's default would add the likelihood
        simpo_gamma=settings.gamma,
    )
    return ContrastTrainer(**_connections(context, pairs, policy), args=config)


def _connections(context: StageContext, pairs: TokenRows[TokenPair], policy: Any) -> dict[str, Any]:
    given = connections(context, policy)
    rows = TokenDataset.from_dict(pair_columns(pairs.rows))
    return given | {"train_dataset": rows, "data_collator": PairCollator(given["processing_class"].pad_token_id or 0)}


def _whole(example: Mapping[str, list[int]]) -> dict[str, list[int]]:
    prompt = example["prompt_ids"]
    whole: dict[str, list[int]] = {}
    for side in ("chosen", "rejected"):
        ids = prompt + example[f"{side}_ids"]
        whole[f"{side}_input_ids"] = ids
        whole[f"{side}_attention_mask"] = [1] * len(ids)
        whole[f"{side}_labels"] = [-100] * len(prompt) + example[f"{side}_ids"]
    return whole
