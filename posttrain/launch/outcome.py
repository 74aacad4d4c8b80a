"""The end of each process of a stage: figures or an error, in a file of its own; and the one error that explains all.

The exit code of a launcher is not used: torchrun ends with 1 whatever the code of its processes was.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain import errors
from posttrain.disk import explain_error, replace_text
from posttrain.errors import BadInput, DiskFailed, Interrupted, OutOfMemory, PosttrainError, Problem, is_out_of_memory
from posttrain.saved import plain, read_as

LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Texts of errors about another process that is gone, or silent for too long."""


class RankFailed(Exception):
    """An exception in one of the processes of a stage that is no error of posttrain's own."""


class RemoteTraceback(Exception):
    """Traceback of another process, as the cause of an error here."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one process."""

    rank: int
    code: int
    """0, or the exit code of its error."""
    time: float
    """Time of its end."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Figures for the manifest."""
    kind: str = ""
    """Class of its error."""
    message: str = ""
    problems: Sequence[Mapping[str, str]] = ()
    traceback: str = ""
    follows: bool = False
    """True when it only noticed that another process was gone."""

    def error(self, world: int) -> Exception:
        """Return its error, to be raised by the command."""
        kind = getattr(errors, self.kind, None)
        if self.problems:
            family = DiskFailed if kind is DiskFailed else BadInput
            return family([Problem(**problem) for problem in self.problems])
        if isinstance(kind, type) and issubclass(kind, PosttrainError):
            return kind(self.message)
        failed = RankFailed(f"{self.kind}: {self.message} (in rank {self.rank} of {world})")
        failed.__cause__ = RemoteTraceback(f"\n\n{self.traceback}")
        return failed


def outcome_of(rank: int, error: BaseException) -> Outcome:
    """Return the end of a process by an error; one of the machine (memory, disk, path) is that of a single process."""
    known: BaseException = error
    if isinstance(error, Exception) and is_out_of_memory(error):
        known = OutOfMemory(error)
    elif isinstance(error, OSError):
        known = explain_error(error) or error
    ours = isinstance(known, PosttrainError)
    problems = known.problems if isinstance(known, BadInput) else []
    return Outcome(
        rank=rank,
        code=known.exit_code if isinstance(known, PosttrainError) else PosttrainError.exit_code,
        time=time.time(),
        kind=type(known).__name__,
        message=str(known),
        problems=[plain(problem) for problem in problems],
        traceback="" if ours else "".join(traceback.format_exception(error)),
        follows=not ours and _tells_of_another(error),
    )


def _tells_of_another(error: BaseException) -> bool:
    """Return True for an error of a process that waited in vain for another."""
    found = getattr(sys.modules.get("torch.distributed"), "DistError", None)
    if found is not None and isinstance(error, found):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"result.{rank}.json"


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write the end of a process."""
    replace_text(_file(folder, outcome.rank), json.dumps(plain(outcome)))


def read_outcomes(folder: Path, world: int) -> dict[int, Outcome]:
    """Return the ends of the processes that have written one, by rank."""
    return {rank: read_as(Outcome, path) for rank in range(world) if (path := _file(folder, rank)).exists()}


def first_fault(outcomes: Mapping[int, Outcome]) -> Outcome | None:
    """Return the fault that made the others end; None when there is none."""
    found = [each for each in outcomes.values() if each.code not in (0, Interrupted.exit_code) and not each.follows]
    return min(found, key=lambda each: each.time, default=None)


def first_stop(outcomes: Mapping[int, Outcome]) -> Outcome | None:
    """Return the first process that stopped as it was asked to; None without one."""
    found = [each for each in outcomes.values() if each.code == Interrupted.exit_code]
    return min(found, key=lambda each: each.time, default=None)
