"""The loss of a stage over its rows, as the loop takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from posttrain.cost.operations import Work
    from posttrain.engine.engine import Engine

Totals = Mapping[str, int]
"""Counts of an optimizer step, over all of its rows: what its loss is divided by, and more to report."""
Sums = dict[str, torch.Tensor]
"""Sums over the rows of a batch, without a graph."""
Row = TypeVar("Row", contravariant=True)


class Objective(Protocol[Row]):
    """A loss that is a sum over the rows of an optimizer step.

    The loop computes it batch by batch, on one process or many. Whatever the cut, the shares of the batches add up to
    the loss of the step: they are divided by the totals of the step, never by those of a batch.
    """

    @property
    def coupled(self) -> bool:
        """True when the rows of a batch meet in the loss: batches then hold the same rows on any number of processes.

        Each has ``per_device_batch_size`` rows, the last of an epoch fewer.
        """

    @property
    def shuffled(self) -> bool:
        """True to draw the rows in another order every epoch; False to train them in the order given."""

    @property
    def drawn(self) -> bool:
        """True when the model draws the rows of a step as it is when the step begins, by ``draw``."""

    def draw(self, step: int, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the rows of a step as its batches take them; asked again for the same step, the same ones."""

    def begin(self, engine: Engine) -> None:
        """Make ready, with the model as it is before training and before a checkpoint is restored.

        Every process calls it.
        """

    def totals(self, rows: Sequence[Row]) -> Totals:
        """Count the rows of a whole step; ``tokens`` among the counts."""

    def work(self, rows: Sequence[Row]) -> Sequence[Work]:
        """Return what the rows of a step ask of the model, to count its operations."""

    def batch(self, rows: Sequence[Row], device: torch.device) -> Any:
        """Return ``rows`` laid out on ``device`` for one forward pass.

        It may be called while another step is computed, in a thread, and draws no random numbers.
        """

    def share(self, model: Any, batch: Any, totals: Totals) -> tuple[torch.Tensor, Sums]:
        """Return the share of a batch in the loss of the step, to take the gradient of, and sums for its figures.

        The sums have the same names for all batches. Nothing in here waits for a GPU.
        """

    def figures(self, sums: Mapping[str, float], totals: Totals) -> dict[str, float]:
        """Return the figures of a step, ``loss`` among them, from the sums over all of its batches."""

    def content(self, row: Row) -> bytes:
        """Return all of a row that the loss depends on: a checkpoint of other rows is not resumed."""
