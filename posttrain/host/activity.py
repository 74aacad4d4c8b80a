"""Which plugin and run this process is busy with, in memory that the process which watches over it can read.

Written by whoever calls into a plugin; read by ``supervisor``. In a process that is not supervised nothing is written.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

SIZE = 1 << 15
"""Bytes of the shared record: a path may have 4,096 bytes, each of them six characters in JSON."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One call into a plugin."""

    plugin: str
    """Name of its entry point."""
    origin: str
    """Distribution and version."""
    call: str
    """What was called: a hook, its import, or a stage."""
    seconds: float | None
    """How long it may go without a sign of life; None: for ever."""
    starting: bool = False
    """Whether the command could do without this plugin, since it is only being loaded."""

    def __str__(self) -> str:
        return f"plugin {self.plugin} ({self.origin}) in {self.call}"


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a process said about itself last."""

    code: int | None = None
    """The exit code that it ends with."""
    activity: Activity | None = None
    """The plugin that it is busy with."""
    run: Path | None = None
    """The directory of the run that it writes."""


class Record:
    """What a process tells about itself, in memory shared with its parent."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._memory = memory
        self._owner = os.getpid()
        self._calls: list[Activity] = []
        self._signs = 0
        self._code: int | None = None
        self._run: Path | None = None

    def push(self, activity: Activity) -> None:
        """A call into a plugin begins."""
        self._calls.append(activity)
        self.write()

    def pop(self) -> None:
        """The innermost call is over."""
        self._calls.pop()
        self.write()

    def write_run(self, directory: Path | None) -> None:
        """This is the run that is written from here on, or none."""
        self._run = directory
        self.write()

    def finish(self, code: int) -> None:
        """The command is done: its exit code counts, whatever happens to the process from here on."""
        self._code = code
        self.write()

    def write(self) -> None:
        """Make the state known; every write is a sign of life."""
        if self._memory is None or os.getpid() != self._owner:  # a fork of this process has nothing to tell
            return
        self._signs += 1
        current = asdict(self._calls[-1]) if self._calls else None
        run = None if self._run is None else str(self._run)
        text = json.dumps({"signs": self._signs, "code": self._code, "current": current, "run": run}).encode()
        self._memory[:SIZE] = text[:SIZE].ljust(SIZE, b"\0")


_record = Record()

lost: dict[str, str] = {}
"""Plugins that ended an earlier attempt at the same command while they were loaded, and how."""


def attach(memory: mmap.mmap, earlier: Mapping[str, str]) -> None:
    """Tell everything to ``memory`` from here on; ``earlier`` are plugins that are not to be loaded again."""
    global _record
    _record = Record(memory)
    lost.update(earlier)


@contextlib.contextmanager
def calling(activity: Activity) -> Iterator[None]:
    """A call into a plugin, for as long as the context lasts."""
    _record.push(activity)
    try:
        yield
    finally:
        _record.pop()


@contextlib.contextmanager
def running(directory: Path) -> Iterator[None]:
    """This process is the writer of the run in ``directory``, for as long as the context lasts."""
    _record.write_run(directory.absolute())
    try:
        yield
    finally:
        _record.write_run(None)


def sign_of_life() -> None:
    """Something was reported: whatever runs is not hanging."""
    _record.write()


def finish(code: int) -> None:
    """The command has ended with ``code``."""
    _record.finish(code)


def read(content: bytes) -> Told:
    """What a record's bytes say; nothing when they were torn by the end of the process."""
    try:
        state = json.loads(content.rstrip(b"\0"))
    except ValueError:
        return Told()
    return Told(
        code=state["code"],
        activity=Activity(**state["current"]) if state["current"] else None,
        run=Path(state["run"]) if state["run"] else None,
    )
