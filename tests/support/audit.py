"""A watch over the interpreter: what a hostile file must never bring about."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "socket.connect",
    "socket.sendto", "pickle.find_class", "webbrowser.open", "ftplib.connect", "smtplib.connect", "urllib.Request",
)  # fmt: skip
"""Events of the interpreter that run a program, open a connection or unpickle."""
_watches: list[tuple[Path, list[str]]] = []


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Collect forbidden events, and files opened for writing outside of ``folder``, while the context lasts."""
    found: list[str] = []
    _watches.append((folder.resolve(), found))
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # modules of ours that nobody has imported yet
    try:
        yield found
    finally:
        sys.dont_write_bytecode = before
        _watches.pop()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watches:
        return
    folder, found = _watches[-1]
    if event in FORBIDDEN:
        found.append(f"{event} {arguments!r:.200}")
    elif event == "open" and _is_write(arguments) and isinstance(arguments[0], str | bytes | os.PathLike):
        path = Path(os.fsdecode(arguments[0])).absolute()
        if not path.is_relative_to(folder) and not path.is_relative_to("/dev"):
            found.append(f"open for writing {path}")


def _is_write(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND))


sys.addaudithook(_hook)  # for good: a hook cannot be removed, and without a watch it does nothing
