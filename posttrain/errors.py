"""The exceptions of the pipeline, their exit codes, and the nearest valid name for a wrong one.

PosttrainError          1  a bug, or anything without a better class
├── BadInput            2  recipe, data, model or command line; carries every problem found
│   ├── RunLocked       2  another process writes this run directory
│   ├── OutOfMemory     2  the memory of the device or of the machine ran out
│   └── DiskFailed      2  the disk is full or fails; with some room, the same command resumes
├── GateFailed          3  a gate failed an artifact
├── GateUndecided       4  a gate could not decide
├── ArtifactDamaged     5  an artifact on disk, or about to be published, is not sound
│   ├── Diverged        5  a loss or gradient is NaN or infinite
│   └── ProofFailed     5  doctor found a wrong mask or gradient
├── PluginFailed        6  a plugin raised, or returned the wrong type
└── Interrupted        75  stopped from outside; run the same command to resume
    └── SpendCapReached  75  the run has spent what it may; with a higher cap it resumes
"""

from __future__ import annotations

import errno
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from posttrain.quoting import lines, one_line

FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that a library's code raises for what it does not know."""


OUT_OF_MEMORY = ("not enough memory", "out of memory", "can't allocate memory", "ALLOC_FAILED")
"""Texts of errors about memory in torch, CUDA and cuBLAS."""

MOST_WHERE = 1000
"""Characters of a place that a message shows."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake in the user's input, and its fix."""

    where: str
    """Place of the mistake: a key of the recipe, ``file:line``, a path."""
    what: str
    """The mistake, in one sentence."""
    fix: str = ""
    """The fix: the nearest valid name, the options, a command."""

    def __str__(self) -> str:
        place = one_line(self.where)
        if len(place) > MOST_WHERE:
            place = f"{place[: MOST_WHERE // 2]}...{place[-MOST_WHERE // 4 :]}"
        return f"{place}: {self.what}" + (f"\n    {self.fix}" if self.fix else "")


class PosttrainError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class BadInput(PosttrainError):
    """The user's input cannot be used; nothing was trained or written."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | Problem) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RunLocked(BadInput):
    """Another process writes the same run directory."""


class OutOfMemory(BadInput):
    """The memory of the device, or of the machine, ran out."""

    def __init__(self, error: BaseException) -> None:
        fix = (
            "Lower per_device_batch_size (with a higher gradient_accumulation), sequence_length or gate.batch_size, or "
            "set gradient_checkpointing=true"
        )
        super().__init__(Problem(where="memory", what=f"it ran out: {first_line(error)}", fix=fix))


class DiskFailed(BadInput):
    """The disk is full, or fails: nothing published is lost.

    No interruption: a job that is queued again after one would fill the disk again and again.
    """


class GateFailed(PosttrainError):
    """A gate judged an artifact worse than its rules allow."""

    exit_code = 3


class GateUndecided(PosttrainError):
    """A gate saw too little evidence to pass or to fail an artifact."""

    exit_code = 4


class ArtifactDamaged(PosttrainError):
    """An artifact does not match its manifest, or must not become one."""

    exit_code = 5


class Diverged(ArtifactDamaged):
    """A loss or gradient of training is NaN or infinite; its weights must not become an artifact."""


class ProofFailed(ArtifactDamaged):
    """A mask or gradient differs from the result of plain code; training with it would give a wrong artifact."""


class PluginFailed(PosttrainError):
    """A plugin raised, or returned a value its hook does not allow."""

    exit_code = 6


class Interrupted(PosttrainError):
    """The run was stopped from outside; the same command resumes it."""

    exit_code = 75


BY_HAND = "stopped by Ctrl-C"


class SpendCapReached(Interrupted):
    """The run has spent what it may; with a higher ``spend_cap`` the same command resumes it."""


def interruption(error: Exception, *, heard: bool) -> Interrupted | None:
    """Return the request to stop that a library has turned into ``error``; None for an error of its own.

    A signal is heard between any two instructions, within those of libraries, too: one that is being imported reports
    what was raised there as a fault of its import. One in C may even lose it, and fail at the next import: once a
    signal was ``heard``, such a fault is the signal's.
    """
    behind: BaseException | None = error
    if isinstance(error, PosttrainError) and not isinstance(error, PluginFailed):
        return None
    while behind is not None:
        if isinstance(behind, Interrupted):
            return behind
        if isinstance(behind, KeyboardInterrupt):
            return Interrupted(BY_HAND)
        behind = behind.__cause__ or behind.__context__
    return Interrupted(BY_HAND) if heard and isinstance(error, ImportError) else None


def nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the option most like ``name`` and other than it, or None when none is close."""
    import difflib

    matches = difflib.get_close_matches(name, [each for each in options if each != name], n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggest(name: str, options: Iterable[str]) -> str:
    """Return the fix for a wrong ``name``: the nearest option, if any, then all of them."""
    known = sorted(set(options))
    close = nearest(name, known)
    listed = ", ".join(known) if known else "nothing"
    return (f"Did you mean {close}? " if close else "") + f"Available: {listed}"


def explain(error: PosttrainError) -> int:
    """Print an error for a person, on standard error, and return its exit code."""
    problems = error.problems if isinstance(error, BadInput) else [error]
    for problem in problems:
        print(f"error: {lines(str(problem))}", file=sys.stderr)
    if isinstance(error, Interrupted) and not isinstance(error, SpendCapReached):
        print("Run the same command again to resume.", file=sys.stderr)
    return error.exit_code


def reject(where: str, what: str, fix: str = "") -> NoReturn:
    """Raise BadInput with one problem."""
    raise BadInput(Problem(where=where, what=what, fix=fix))


def brief(error: Exception) -> str:
    """Return a library's error in one line; raise it again when it says that memory ran out."""
    if is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its type when it has none, in 200 characters at most."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for every way in which Python, torch and the system report memory that ran out."""
    # by name and text: torch is not imported here, and its allocator on a CPU raises a bare RuntimeError
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def require_finite(step: int, name: str, value: float, fix: str = "Lower lr or raise warmup_ratio") -> None:
    """Raise Diverged when a figure of optimizer step ``step`` is NaN or infinite."""
    if not math.isfinite(value):
        raise Diverged(f"training diverged at step {step}: the {name} is {value}. Nothing was published. {fix}")


def shown(value: Any) -> str:
    """Return the value as text for a message, in 40 characters at most."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
