"""Direct preference optimisation (arXiv:2305.18290) and the losses that grew from it, stacked on the SFT artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from posttrain import StageContext
from posttrain_preference.config import DPOSettings
from posttrain_preference.losses import AT_REFERENCE, SFT
from posttrain_preference.pairs import TokenPair, render_pairs
from posttrain_preference.stage import Build, train

if TYPE_CHECKING:
    from posttrain_preference.reference import LogProbs


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, towards the chosen answers.

    Continues from the newest checkpoint in ``context.checkpoints``. Raises BadInput when no pair can be trained on,
    ArtifactDamaged when the reference is not the SFT model, Interrupted when the run was asked to stop.
    """
    train(context, render_pairs, trainer, start, referenced=True)


def trainer() -> Build:
    """What makes TRL's trainer; importing it takes seconds."""
    from posttrain_preference.dpo_trainer import build

    return build


def start(settings: DPOSettings, rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """The loss where policy and reference agree: a constant, but for ``sft``, the chosen answers' likelihood."""
    constant = sum(
        weight * AT_REFERENCE[name](settings.beta, settings.label_smoothing)
        for name, weight in settings.weighted()
        if name != SFT
    )
    return constant + dict(settings.weighted()).get(SFT, 0.0) * nll(rows, log_probs)


def nll(rows: Sequence[TokenPair], log_probs: LogProbs) -> float:
    """Negative log-likelihood of the chosen answers, in nats per token."""
    return -sum(chosen for chosen, _ in log_probs) / sum(len(row.chosen) for row in rows)
