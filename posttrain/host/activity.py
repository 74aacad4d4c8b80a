"""The plugin, the foreign file and the run that this process is busy with, in memory shared with its supervisor.

Every call into a plugin writes here, and every one into compiled code that works by a stranger's file; ``supervisor``
reads. A process without a supervisor writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SIZE = 1 << 16
"""Bytes of the shared record: each of two paths may have 4,096 bytes, each of them six characters in JSON."""
SILENCE_LIMIT = 3600.0
"""Seconds that a plugin may go without a sign of life, unless a run sets another limit."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One call into a plugin, or into compiled code that works by a stranger's file."""

    plugin: str = ""
    """Name of its entry point; empty for a file."""
    origin: str = ""
    """Distribution and version."""
    file: str | None = None
    """The stranger's file or folder; None for a plugin."""
    call: str
    """The hook or stage that was called, or ``import``; for a file, what it works on."""
    silence_limit: float | None
    """Seconds it may go without a sign of life; None: for ever."""
    starting: bool = False
    """True while the plugin is loaded: the command can go on without it."""

    def __str__(self) -> str:
        return f"plugin {self.plugin} ({self.origin}) in {self.call}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The last state that a process wrote."""

    code: int | None = None
    """Exit code with which the process ends."""
    activity: Activity | None = None
    """Innermost call."""
    run: Path | None = None
    """Directory of the run that the process writes."""


class Record:
    """State of a process, in memory shared with its parent."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._memory = memory
        self._owner = os.getpid()
        self._calls: list[Activity] = []
        self._signs = 0
        self._code: int | None = None
        self._run: Path | None = None
        self.silence_limit: float | None = SILENCE_LIMIT

    def push(self, activity: Activity) -> None:
        """Begin a call."""
        self._calls.append(activity)
        self.write()

    def pop(self) -> None:
        """End the innermost call."""
        self._calls.pop()
        self.write()

    @property
    def run(self) -> Path | None:
        """Directory of the run, or none."""
        return self._run

    def write_run(self, directory: Path | None) -> None:
        """Name the run that this process writes, or none."""
        self._run = directory
        self.write()

    def finish(self, code: int) -> None:
        """End the command: its exit code counts, even if the process crashes afterwards."""
        self._code = code
        self.write()

    def write(self) -> None:
        """Write the state; every write is a sign of life."""
        if self._memory is None or os.getpid() != self._owner:  # a fork must not write over its parent's state
            return
        self._signs += 1
        current = vars(self._calls[-1]) if self._calls else None
        run = None if self._run is None else str(self._run)
        text = json.dumps({"signs": self._signs, "code": self._code, "current": current, "run": run}).encode()
        text = text[: SIZE - 1] + b"\0"  # what follows is an earlier state's
        self._memory[: len(text)] = text


_record = Record()

lost: dict[str, str] = {}
"""Plugins that ended the process while they were loaded, in earlier attempts at the same command, and how."""


def attach(memory: mmap.mmap, earlier: Mapping[str, str]) -> None:
    """Write to ``memory`` from now on; plugins in ``earlier`` are not loaded again."""
    global _record
    _record = Record(memory)
    lost.update(earlier)


@contextlib.contextmanager
def calling(activity: Activity) -> Iterator[None]:
    """Record a call while the context lasts."""
    _record.push(activity)
    try:
        yield
    finally:
        _record.pop()


@contextlib.contextmanager
def running(directory: Path, silence_limit: float | None = SILENCE_LIMIT) -> Iterator[None]:
    """Record the run in ``directory``, and its limit for the silence of plugins, while the context lasts."""
    _record.silence_limit = silence_limit
    _record.write_run(directory.absolute())
    try:
        yield
    finally:
        _record.silence_limit = SILENCE_LIMIT
        _record.write_run(None)


def run_directory() -> Path | None:
    """Return the directory of the run that this process works for; None without one."""
    return _record.run


def silence_limit() -> float | None:
    """Return the seconds that a plugin may go without a sign of life in the current run; None: for ever."""
    return _record.silence_limit


def sign_of_life() -> None:
    """Report progress, so that the current call does not count as hanging."""
    _record.write()


def finish(code: int) -> None:
    """Record the exit code of the command."""
    _record.finish(code)


def read(content: bytes) -> Report:
    """Parse a record's bytes; return an empty report when the end of the process tore them."""
    try:
        state = json.loads(content.partition(b"\0")[0])
    except ValueError:
        return Report()
    return Report(
        code=state["code"],
        activity=Activity(**state["current"]) if state["current"] else None,
        run=Path(state["run"]) if state["run"] else None,
    )
