"""posttrain.log of a run: what the display said, what was printed on standard error, and what libraries logged.

A resumed run is appended. Every line has its time; none holds a secret or a control character.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from posttrain.quoting import lines
from posttrain.run.display import Display

LOG = "posttrain.log"
NAMED = ("posttrain", "torch", "transformers", "peft", "lm_eval")
"""Distributions whose versions are noted at every start."""
logger = logging.getLogger("posttrain")


class RunLog:
    """An open posttrain.log. A disk that takes no more ends the log, and never the run."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream: IO[str] | None = stream

    def write(self, text: str) -> None:
        """Append a text, each of its lines with the time."""
        if self._stream is None:
            return
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            for line in lines(text).splitlines():
                self._stream.write(f"{now}  {line}\n")
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: closed, by a thread that outlives the run
            self._stream = None


class Copied:
    """Standard error, with a copy of every whole line in the log."""

    def __init__(self, stream: IO[str], log: RunLog) -> None:
        self.below = stream
        self._log, self._begun = log, ""

    def write(self, text: str) -> int:
        """Write a text, and log the lines that it ends."""
        ended, newline, begun = (self._begun + text).rpartition("\n")
        self._begun = begun
        if newline:
            self._log.write(ended)
        return self.below.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)


class Handler(logging.Handler):
    """Records of every library, in the log; warnings on the terminal as without it, and with -v all of them."""

    def __init__(self, log: RunLog, display: Display, *, shown: int) -> None:
        super().__init__()
        self._log, self._display, self._shown = log, display, shown

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        text = f"{record.levelname.lower()}: {record.name}: {record.getMessage()}"
        self._log.write(text)
        if record.levelno >= self._shown:
            self._display.console.print(text)


@contextlib.contextmanager
def logged(path: Path, command: Sequence[str], display: Display) -> Iterator[None]:
    """Keep a log in the folder of a run, to its end whatever that is."""
    with (path / LOG).open("a", encoding="utf-8", errors="replace") as stream:
        log = RunLog(stream)
        log.write(f"--- {shlex.join(command)}")
        with _received(log, display):
            logger.debug("Python %s on %s; %s", platform.python_version(), platform.platform(), ", ".join(_versions()))
            try:
                yield
            except BaseException as error:
                log.write(f"--- ended by {type(error).__name__}: {error}")
                raise
        log.write("--- ended")


@contextlib.contextmanager
def _received(log: RunLog, display: Display) -> Iterator[None]:
    """Send the display, standard error and all loggers into the log."""
    root = logging.getLogger()
    # Python itself prints warnings only while no logger has a handler.
    shown = logging.DEBUG if display.verbose else logging.CRITICAL + 1 if root.handlers else logging.WARNING
    handler, levels, errors = Handler(log, display, shown=shown), (root.level, logger.level), sys.stderr
    root.addHandler(handler)
    if display.verbose:
        root.setLevel(logging.DEBUG)
    logger.setLevel(logging.DEBUG)
    display.log = log.write
    sys.stderr = Copied(errors, log)
    try:
        yield
    finally:
        sys.stderr, display.log = errors, None
        root.removeHandler(handler)
        root.setLevel(levels[0])
        logger.setLevel(levels[1])


def _versions() -> Iterator[str]:
    """Yield the versions of what a run's numbers depend on."""
    for name in NAMED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name} {importlib.metadata.version(name)}"
