"""The rows of each optimizer step, and their batches.

Documents that begin alike, with one system prompt or one list of tools, may share a batch's copy of that beginning:

    row          s s s u0 a0 | s s s u1 | v v        three documents, the first two of which begin with s s s
    batch        s s s u0 a0 u1 | v v                the beginning once, then what follows it in each
"""

# B = 1 (all rows of a batch end to end), T = tokens of the batch, N = trained tokens of the batch,
# R = tokens of all documents of the batch, L = tokens of a document

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from posttrain.engine.ahead import on_device
from posttrain.engine.attention_kernels import Family
from posttrain.engine.config import LoopConfig
from posttrain.tokens.packing import PackedRow

IGNORED = -100
"""Target of an untrained token."""


ALIKE = 16
"""Fewest tokens that documents begin alike with for their beginning to be held once."""
WORTHWHILE = 0.04
"""Least share of a batch's tokens to save by that: attention copies what it shares, which takes time of its own."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The documents of a batch, one after another, with or without shared beginnings."""

    families: Sequence[Family]
    """Tokens of each beginning, and of what follows it in its documents; none where no document shares any."""
    lengths: Sequence[int]
    """Tokens of each family, or of each document where there are none; their sum is T."""
    kept: npt.NDArray[np.int64]
    """The place in the rows of each token of the batch, [T]."""
    places: npt.NDArray[np.int64]
    """The place in the batch of each token of the rows, [R]."""

    @classmethod
    def of(cls, rows: Sequence[PackedRow], shared: bool) -> Layout:
        """Return the layout of ``rows``; ``shared`` holds a beginning once, where that saves enough."""
        lengths = [length for row in rows for length in row.lengths]
        tokens = sum(lengths)
        if shared and len(lengths) > 1:
            groups = _alike(np.concatenate([row.input_ids for row in rows]), lengths)
            if sum(beginning * (len(group) - 1) for beginning, group in groups) >= WORTHWHILE * tokens:
                return cls._sharing(groups, lengths)
        return cls(families=(), lengths=lengths, kept=np.arange(tokens), places=np.arange(tokens))

    @classmethod
    def _sharing(cls, groups: Sequence[tuple[int, Sequence[int]]], lengths: Sequence[int]) -> Layout:
        starts = np.cumsum((0, *lengths))
        families = [(beginning, [lengths[each] - beginning for each in group]) for beginning, group in groups]
        places = np.empty(starts[-1], dtype=np.int64)
        kept: list[npt.NDArray[np.int64]] = []
        held = 0
        for beginning, group in groups:
            first = np.arange(held, held + beginning)
            kept.append(np.arange(starts[group[0]], starts[group[0]] + beginning))
            held += beginning
            for each in group:
                own = np.arange(starts[each] + beginning, starts[each + 1])
                places[starts[each] : starts[each] + beginning] = first
                places[own] = np.arange(held, held + len(own))
                kept.append(own)
                held += len(own)
        sizes = [beginning + sum(rests) for beginning, rests in families]
        return cls(families=families, lengths=sizes, kept=np.concatenate(kept), places=places)


def _alike(ids_R: npt.NDArray[np.int32], lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return the tokens that the documents of each group begin alike with, and the numbers of these documents.

    Each document is in one group, and has at least one token after its beginning.
    """
    documents = np.split(ids_R, np.cumsum(lengths)[:-1])
    groups: dict[bytes | int, list[int]] = {}
    for number, ids_L in enumerate(documents):
        groups.setdefault(ids_L[:ALIKE].tobytes() if len(ids_L) > ALIKE else number, []).append(number)
    return [(_common([documents[each] for each in group]), group) for group in groups.values()]


def _common(documents: Sequence[npt.NDArray[np.int32]]) -> int:
    """Return the tokens that all ``documents`` begin with, fewer than the shortest has; 0 for a single one."""
    first, *others = documents
    if not others:
        return 0
    shortest = min(map(len, documents)) - 1
    equal = np.all([each[:shortest] == first[:shortest] for each in others], axis=0)
    return shortest if equal.all() else int(np.argmin(equal))


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end for one forward pass: documents are kept apart by their lengths, so nothing is padded."""

    ids: torch.Tensor
    """Token ids [B, T]."""
    lengths: Sequence[int]
    """Tokens of each document, or of each family of documents; their sum is T."""
    trained: torch.Tensor
    """Positions in T, [N], whose next token is trained; a shared one as often as its documents train what follows."""
    targets: torch.Tensor
    """The tokens to predict there, [N]."""
    families: Sequence[Family] = ()
    """Tokens of each beginning that documents share, and of what follows it in each; none where they share nothing."""

    @classmethod
    def of(cls, rows: Sequence[PackedRow], device: torch.device, shared: bool = False) -> Batch:
        """Return one batch of ``rows`` on ``device``; ``shared`` holds a beginning once for all of its documents."""
        layout = Layout.of(rows, shared)
        ids = np.concatenate([row.input_ids for row in rows])[layout.kept].astype(np.int64)
        targets = np.concatenate([row.targets(IGNORED) for row in rows]).astype(np.int64)
        trained = np.flatnonzero(targets != IGNORED)
        return cls(
            ids=on_device(torch.from_numpy(ids)[None], device),
            lengths=layout.lengths,
            trained=on_device(torch.from_numpy(layout.places[trained]), device),
            targets=on_device(torch.from_numpy(targets[trained]), device),
            families=layout.families,
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
