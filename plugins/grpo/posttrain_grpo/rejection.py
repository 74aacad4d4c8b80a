"""Rejection sampling: the parent's best answers, chosen by the source ``on_policy``, are trained with SFT's loss."""

from __future__ import annotations

from posttrain import StageContext


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, on the stage's conversations, and save it.

    Raises as ``StageContext.finetune`` does.
    """
    context.finetune(context.records)
