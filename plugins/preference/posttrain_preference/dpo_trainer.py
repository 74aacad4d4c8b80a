"""TRL's DPO trainer, fed with our token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from posttrain import StageContext
from posttrain_preference.pairs import TokenPair, pair_columns
from posttrain_preference.rows import TokenRows
from posttrain_preference.trainer import StageTrainer, TokenDataset, arguments, connections


class PairTrainer(StageTrainer, DPOTrainer):
    """DPO on pairs that are token ids already."""

    def columns(self, rows: Sequence[TokenPair]) -> dict[str, list[Any]]:
        """Prompt, chosen and rejected answer."""
        return pair_columns(rows)


def build(context: StageContext, pairs: TokenRows[TokenPair], policy: Any, reference: Any) -> PairTrainer:
    """A trainer of ``policy`` against ``reference``."""
    settings, given = context.config, connections(context, policy)
    config = DPOConfig(
        **arguments(context, policy),
        loss_type=list(settings.loss_type),
        loss_weights=settings.loss_weights and list(settings.loss_weights),
        label_smoothing=settings.label_smoothing,
        discopop_tau=settings.discopop_tau,
        max_length=None,
    )
    return PairTrainer(
        **given,
        ref_model=reference,
        args=config,
        train_dataset=TokenDataset.from_dict(pair_columns(pairs.rows)),
        data_collator=DataCollatorForPreference(pad_token_id=given["processing_class"].pad_token_id or 0),
    )
