"""Traces of some code in the file system."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = {
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.truncate": 0,
    "shutil.rmtree": 0,
    "os.rename": 1,
    "os.symlink": 1,
    "os.link": 1,
}
"""Audit events that change the file system, except ``open``, with the place of the path in their arguments."""
RELATIVE = ("os.mkdir", "os.remove", "os.rmdir", "os.rename")
"""Events whose last argument is a folder's descriptor or -1; with a descriptor, an earlier event had the path."""
HARMLESS = ("/dev/", "/proc/")


class Footprint:
    """Context manager that notes the writes of the code inside, except to allowed folders.

    Python's audit events show them; writes of native code stay unseen. Files of compiled Python are allowed.
    """

    _active: Footprint | None = None
    _hooked = False

    def __init__(self, allowed: Sequence[Path]) -> None:
        self.allowed = [os.path.join(os.path.realpath(path), "") for path in allowed]
        self.written: set[str] = set()
        """Paths outside ``allowed`` that were written, created, renamed or removed."""

    def __enter__(self) -> Footprint:
        if not Footprint._hooked:
            sys.addaudithook(_audit)  # for good: Python cannot remove one
            Footprint._hooked = True
        Footprint._active = self
        return self

    def __exit__(self, *unused: object) -> None:
        Footprint._active = None

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note the path of an audit event that writes outside ``allowed``."""
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITING)
        else:
            path, writes = arguments[EVENTS[event]], event not in RELATIVE or arguments[-1] == -1
        if writes and isinstance(path, str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(path))
            if not (f"{place}/".startswith((*self.allowed, *HARMLESS)) or "__pycache__" in place):
                self.written.add(place)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    active = Footprint._active
    if active is not None and (event == "open" or event in EVENTS):
        active.note(event, arguments)
