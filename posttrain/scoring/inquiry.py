"""Requests of a gate that wait for answers, shared by processes that know no task: each takes every n-th block.

A block is asked by itself, so that answers are the same bits whoever gives them. Each process writes its own file of
answers beside the command's; the command reads all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.config.schema import Backend
from posttrain.errors import Interrupted
from posttrain.scoring.cache import ScoreCache

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource
    from posttrain.gate.spec import GateProgress
    from posttrain.scoring.harness.responder import Responder
    from posttrain.scoring.systems import Loading

Place = tuple[int, str, int]
"""Look, task and number of a block."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The blocks of one task that one system has not answered."""

    look: int
    """Number of the look, from 1."""
    system: str
    task: str
    key: str
    """Key of the answers."""
    ends: tuple[int, ...]
    """Tokens that end a text beside the model's own."""
    blocks: tuple[int, ...]
    """Numbers of the blocks."""
    total: int
    """Documents of the task at this look."""


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """Everything that a process needs to ask its share, but for the requests."""

    systems: Mapping[str, ModelSource]
    """All systems of the gate; the candidate's tokenizer is the one of all."""
    dtype: str
    device: str
    """Type of the device, which is part of every key."""
    seed: int
    size: int
    """Documents of a block."""
    cache: Path
    """Folder of the answers."""
    parts: tuple[Part, ...]
    """In the order of asking."""

    @property
    def blocks(self) -> int:
        """Number of blocks of all parts."""
        return sum(len(part.blocks) for part in self.parts)

    def share(self, rank: int, world: int) -> list[tuple[int, list[int]]]:
        """Return the blocks that process ``rank`` of ``world`` asks, by the number of their part: every n-th of all."""
        shared, first = [], 0
        for number, part in enumerate(self.parts):
            shared.append((number, list(part.blocks[(rank - first) % world :: world])))
            first += len(part.blocks)
        return shared

    def places(self, rank: int, world: int) -> set[Place]:
        """Return the places of the blocks of such a share."""
        shared = ((self.parts[number], blocks) for number, blocks in self.share(rank, world))
        return {(part.look, part.task, block) for part, blocks in shared for block in blocks}

    def documents(self, part: Part, block: int) -> int:
        """Return the number of documents of a block."""
        return min(self.size, part.total - block * self.size)


class ShareProgress(Protocol):
    """Receiver of the progress of a process."""

    def answered(self, part: int, documents: int, tokens: int = 0) -> None:
        """Report so many answered documents of a part, and the tokens of the next ones so far."""

    def cut(self, part: int, prompts: int) -> None:
        """Report prompts of a part that lost their beginning."""

    def looked(self, look: int) -> None:
        """Report that this process has asked its share of a look and of all before it."""


class Inquirers(Protocol):
    """Processes that answer in place of this one."""

    def __call__(
        self,
        inquiry: Inquiry,
        requests: Iterable[tuple[Place, Sequence[Any]]],
        folder: Path,
        progress: GateProgress,
        is_settled: Callable[[int], bool],
    ) -> None:
        """Have an inquiry answered, from the values of its requests, where that pays; work in ``folder``.

        ``is_settled(n)`` is asked when the first n looks have their answers, and ends the processes with True. Raises
        what one process would; one that died or hangs is a PosttrainError.
        """


def ask_share(
    inquiry: Inquiry,
    requests: Mapping[Place, Sequence[Any]],
    place: tuple[int, int],
    loading: Loading,
    progress: ShareProgress,
    stop_requested: Callable[[], bool],
) -> None:
    """Ask the share of the process at ``place``, its rank and the number of processes, look by look.

    ``requests`` are the values of those of each of its blocks.

    Raises ArtifactDamaged when an output is not finite, Interrupted after ``stop_requested``: every answer is kept.
    """
    from posttrain.scoring.responders import Responders

    tokenizer = loading.tokenizer(inquiry.systems["candidate"])
    models = Responders(inquiry.systems, inquiry.dtype, Backend.hf, inquiry.size, inquiry.seed, loading, tokenizer)
    share = _Share(inquiry, requests, place[0], progress, stop_requested)
    waiting = [(number, blocks) for number, blocks in inquiry.share(*place) if blocks]
    for look in sorted({part.look for part in inquiry.parts}):
        mine = [(number, blocks) for number, blocks in waiting if inquiry.parts[number].look == look]
        models.ask_each([inquiry.parts[number].system for number, _ in mine], partial(share.ask, mine))
        progress.looked(look)


@dataclass(frozen=True)
class _Share:
    """The blocks of one process."""

    inquiry: Inquiry
    requests: Mapping[Place, Sequence[Any]]
    rank: int
    progress: ShareProgress
    stop_requested: Callable[[], bool]

    def ask(self, mine: Sequence[tuple[int, Sequence[int]]], system: str, responder: Responder) -> None:
        """Ask the blocks of one system."""
        for number, blocks in mine:
            if self.inquiry.parts[number].system == system:
                self._ask_part(number, blocks, responder)

    def _ask_part(self, number: int, blocks: Sequence[int], responder: Responder) -> None:
        from posttrain.scoring.harness.requests import read_request
        from posttrain.scoring.harness.scoring import ask_block

        inquiry, part = self.inquiry, self.inquiry.parts[number]
        kept = ScoreCache(inquiry.cache).blocks(part.key, inquiry.size, self.rank)
        responder.cut, done = 0, 0
        for block in blocks:
            if self.stop_requested():
                raise Interrupted("stopped by a signal; every answer so far is kept")
            tell = partial(self.progress.answered, number, done)
            where = f"{part.system}, {part.task}"
            asked = [read_request(values) for values in self.requests[part.look, part.task, block]]
            ask_block(asked, block, part.ends, responder, inquiry.seed, where, tell)
            kept.add(block, [request.resps for request in asked])
            done += inquiry.documents(part, block)
            self.progress.answered(number, done)
        if responder.cut:
            self.progress.cut(number, responder.cut)


class Tally:
    """The progress of all processes together, shown as that of one: part after part, in the order of asking."""

    def __init__(self, inquiry: Inquiry, advance: Callable[..., None]) -> None:
        self._inquiry, self._advance = inquiry, advance
        self._done: list[dict[int, tuple[int, int]]] = [{} for _ in inquiry.parts]
        self._current = 0
        self._cut: dict[tuple[str, str], int] = {}

    def answered(self, rank: int, part: int, documents: int, tokens: int) -> None:
        """Take the progress of one process."""
        self._done[part][rank] = documents, tokens
        shown = part == self._current  # those ahead are shown in their turn
        while shown:
            shown = self._tell(tokens > 0)

    def cut(self, part: int, prompts: int) -> None:
        """Take the number of cut prompts of one process."""
        found = self._inquiry.parts[part]
        name = found.system, found.task
        self._cut[name] = self._cut.get(name, 0) + prompts

    def notes(self) -> Iterator[str]:
        """Yield a line about the cut prompts of each system and task."""
        for (system, task), count in self._cut.items():
            yield describe_cut(count, task, system)

    def _tell(self, within: bool) -> bool:
        """Show the current part, ``within`` a block by its tokens; return True when the next one is to be shown."""
        part, reports = self._inquiry.parts[self._current], self._done[self._current].values()
        missing = sum(self._inquiry.documents(part, block) for block in part.blocks)
        done = part.total - missing + sum(documents for documents, _ in reports)
        tokens = sum(tokens for _, tokens in reports) if within else 0
        self._advance(part.system, part.task, done, part.total, tokens)
        if done < part.total:
            return False
        self._current += 1
        return self._current < len(self._inquiry.parts)


def describe_cut(prompts: int, task: str, system: str) -> str:
    """Return the line about prompts of a task that lost their beginning."""
    return f"{prompts} prompts of {task} did not fit {system} and lost their beginning"
