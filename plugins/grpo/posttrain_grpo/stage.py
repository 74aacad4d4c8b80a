"""GRPO from start to end: the questions, the loss, the loop."""

from __future__ import annotations

from posttrain import StageContext


def run(context: StageContext) -> None:
    """Train the parent's adapter, or its full weights, on its own answers to the stage's questions, and save it.

    Raises:
        BadInput: A question cannot be rendered or leaves no room for an answer, or nothing is learnt any more.
        ArtifactDamaged: The policy does not start at the parent, or training diverged.
        Interrupted: The run was asked to stop.
    """
    from posttrain_grpo.losses import GRPOLoss  # imports torch, and listing the stages must not

    context.train_sampled(context.records, GRPOLoss(context.config))
