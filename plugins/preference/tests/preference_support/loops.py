"""A stage's training, begun and proven, looked at in the place of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from posttrain_preference.stage import run

from posttrain import StageContext
from posttrain.engine.answer_objective import AnswerObjective, Numbered
from posttrain.engine.loop import Training


class Looked(Exception):
    """The training was looked at, and nothing was trained."""


def before_steps(context: StageContext, look: Callable[[Training, Any], None]) -> None:
    """Run the stage up to its first step, and let ``look`` see the training and its engine instead."""

    def looked(training: Training, engine: Any) -> Any:
        look(training, engine)
        raise Looked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_train", looked)
        with pytest.raises(Looked):
            run(context)


def objective(training: Training) -> AnswerObjective[Any]:
    """The loss of a stage on answers."""
    return cast("AnswerObjective[Any]", training.objective)


def loss_of(training: Training, rows: Sequence[Numbered[Any]] | None = None) -> torch.Tensor:
    """The loss of ``rows`` as one batch of a step of their own."""
    chosen = training.rows if rows is None else rows
    batch = training.objective.batch(chosen, training.model.device)
    share, _ = training.objective.share(training.model, batch, training.objective.totals(chosen))
    return share


def gradient(training: Training, rows: Sequence[Numbered[Any]] | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of ``rows`` as one step, and its gradient by the names of the trained weights."""
    training.model.zero_grad(set_to_none=True)
    loss = loss_of(training, rows)
    loss.backward()
    named = training.model.named_parameters()
    return loss.item(), {name: each.grad.clone() for name, each in named if each.grad is not None}
