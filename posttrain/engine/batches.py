"""The rows of each optimizer step, and their batches."""

# B = 1 (all rows of a batch end to end), T = tokens of the batch, N = trained tokens of the batch

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from posttrain.engine.ahead import on_device
from posttrain.engine.config import LoopConfig
from posttrain.tokens.packing import PackedRow

IGNORED = -100
"""Target of an untrained token."""


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end for one forward pass: documents are kept apart by their lengths, so nothing is padded."""

    ids: torch.Tensor
    """Token ids [B, T]."""
    lengths: list[int]
    """Tokens of each document; their sum is T."""
    trained: torch.Tensor
    """Positions in T, [N], whose next token is trained."""
    targets: torch.Tensor
    """The tokens to predict there, [N]."""

    @classmethod
    def of(cls, rows: Sequence[PackedRow], device: torch.device) -> Batch:
        """Return one batch of ``rows`` on ``device``."""
        ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
        targets = np.concatenate([row.targets(IGNORED) for row in rows]).astype(np.int64)
        trained = np.flatnonzero(targets != IGNORED)
        return cls(
            ids=on_device(torch.from_numpy(ids)[None], device),
            lengths=[length for row in rows for length in row.lengths],
            trained=on_device(torch.from_numpy(trained), device),
            targets=on_device(torch.from_numpy(targets[trained]), device),
        )


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """The rows of every optimizer step: a function of the seed and the step alone: resuming needs no state."""

    rows: int
    per_step: int
    total: int
    """Optimizer steps."""
    seed: int
    shuffled: bool = True
    """False takes the rows in the order given, in every epoch."""
    visits: int = 1
    """Steps in a row that take the same rows."""

    @classmethod
    def from_config(cls, config: LoopConfig, rows: int, seed: int, shuffled: bool = True) -> RowOrder:
        """Return the order of a run over ``rows`` rows. The last step of an epoch may have fewer rows."""
        per_step = config.per_device_batch_size * config.gradient_accumulation
        total = config.epochs * -(-rows // per_step) * config.visits
        total = min(total, config.max_steps or total)
        return cls(rows=rows, per_step=per_step, total=total, seed=seed, shuffled=shuffled, visits=config.visits)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return -(-self.rows // self.per_step) * self.visits

    def of_step(self, step: int) -> list[int]:
        """Return the indices of the rows of optimizer step ``step``, counted from 1."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        start = place // self.visits * self.per_step
        if not self.shuffled:
            return list(range(start, min(start + self.per_step, self.rows)))
        indices: list[int] = _permutation(self.seed, epoch, self.rows)[start : start + self.per_step].tolist()
        return indices

    def __iter__(self) -> Iterator[list[int]]:
        return (self.of_step(step) for step in range(1, self.total + 1))


def rows_per_batch(config: LoopConfig, processes: int) -> int:
    """Return the rows of a forward pass: those of the recipe, or fewer where these do not divide among processes.

    A step has the rows that the recipe says, whatever the number of processes.
    """
    if config.gradient_accumulation % processes == 0:
        return config.per_device_batch_size
    share = config.per_device_batch_size * config.gradient_accumulation // processes
    return -(-share // -(-share // config.per_device_batch_size))


def deal(batches: int, rank: int, processes: int) -> list[tuple[int, bool]]:
    """Return the batches that process ``rank`` takes of a step, each with True when it counts.

    All processes take equally many, or the others would wait for ever: one that has too few takes the first again, for
    nothing.
    """
    turns = range(-(-batches // processes))
    indices = [rank + turn * processes for turn in turns]
    return [(index, True) if index < batches else (0, False) for index in indices]


@lru_cache(maxsize=1)
def _permutation(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)
