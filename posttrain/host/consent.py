"""The user's consent to code that task files bring and to programs that a model writes.

A recipe cannot give it. It comes from the command line of the present command, ``--trust-tasks`` or
``...tasks.NAME.run_code=true``, or from a file of the user's own, whose lines are the SHA-256 of a task's files or
``run_code NAME``. What ships with posttrain and lm-eval and what plugins register needs none.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

FLAG = "--trust-tasks"
_RUN_CODE = re.compile(r"(?:^|[.+])tasks\.([^=]+)\.run_code=true", re.IGNORECASE)


@dataclass(frozen=True)
class Given:
    """The consent of one command line."""

    everything: bool = False
    """True with ``--trust-tasks``."""
    programs: frozenset[str] = frozenset()
    """Entries of a gate's tasks that the command line itself allows to run programs of the model."""


_given = Given()
_shipped: set[Path] = set()


def ship(folders: Iterable[Path]) -> None:
    """Take the tasks of these folders for a plugin's: whoever installed it has consented to its code."""
    _shipped.update(folder.resolve() for folder in folders)


def is_shipped(path: Path) -> bool:
    """Return True for a file in the folder of a plugin's tasks."""
    return any(path.is_relative_to(folder) for folder in _shipped)


@contextlib.contextmanager
def given_by(words: Sequence[str]) -> Iterator[None]:
    """Give the consent of a command line within the context."""
    global _given
    former = _given
    programs = frozenset(match[1] for word in words if (match := _RUN_CODE.search(word)))
    _given = Given(FLAG in words, programs)
    try:
        yield
    finally:
        _given = former


def words() -> list[str]:
    """Return the words that give this command line's consent to the code of task files, for its own processes."""
    return [FLAG] if _given.everything else []


def is_trusted(digest: str) -> bool:
    """Return True when the user allows the code of a task whose files have this digest."""
    return _given.everything or any(line.split()[0] == digest for line in _lines())


def may_run_programs(entry: str, task: str) -> bool:
    """Return True when the user allows programs of the model for an entry of a gate, or for its lm-eval task."""
    allowed = _given.everything or entry in _given.programs
    return allowed or any(line.split()[:2] == ["run_code", task] for line in _lines())


def file() -> Path:
    """Return the path of the user's own file, which need not exist."""
    from pathlib import Path  # where it is asked for: every command imports this module

    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(folder) / "posttrain" / "trusted_tasks"


def _lines() -> list[str]:
    try:
        text = file().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
