"""TRL's KTO trainer, fed with our token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from posttrain import StageContext
from posttrain_preference.feedback import TokenAnswer, feedback_columns
from posttrain_preference.rows import TokenRows
from posttrain_preference.trainer import StageTrainer, TokenDataset, arguments, connections


class JudgedTrainer(StageTrainer, KTOTrainer):
    """KTO on judged answers that are token ids already, in the order in which they are given."""

    def columns(self, rows: Sequence[TokenAnswer]) -> dict[str, list[Any]]:
        """Prompt, answer, label, and the answers of other prompts if the loss asks for them."""
        return feedback_columns(rows, self.args.per_device_train_batch_size, self.calculate_KL)

    def reference_log_probs(self, row: TokenAnswer) -> list[float]:
        """Log-probability of the one answer."""
        log_probs, _ = self.compute_ref_log_probs(self.ref_model, self.batch_of([row]))
        return [log_probs.item()]


def build(context: StageContext, judged: TokenRows[TokenAnswer], policy: Any, reference: Any) -> JudgedTrainer:
    """A trainer of ``policy`` against ``reference``."""
    settings, given = context.config, connections(context, policy)
    config = KTOConfig(
        **arguments(context, policy),
        loss_type=settings.loss_type,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        train_sampling_strategy="sequential",
        max_length=None,
    )
    columns = feedback_columns(judged.rows, settings.per_device_batch_size, settings.loss_type == "kto")
    return JudgedTrainer(
        **given,
        ref_model=reference,
        args=config,
        train_dataset=TokenDataset.from_dict(columns),
        data_collator=DataCollatorForUnpairedPreference(pad_token_id=given["processing_class"].pad_token_id or 0),
    )
