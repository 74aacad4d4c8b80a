"""Index: a text that took long to find, kept in the user's cache beside the state of every file that decides it.

A text is found again only when each of these files and folders is as it was, for the same words, environment, folder
and Python. Anything else, a damaged index or a cache that cannot be written among it, is a text that has to be made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

PASSING = ("_", "COLUMNS", "LINES", "OLDPWD", "PWD", "SHLVL")
"""Variables of the environment that change from command to command and decide nothing."""
RECENT = 2.0
"""Seconds before a text was begun in which a file that decides it must not have changed: it may be half read."""
MOST_KEPT = 32
"""Indexes in the folder; the oldest give way."""


def folder() -> str:
    """Return the folder of the indexes, which need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(root, "posttrain", "index")


def situation() -> list[object]:
    """Return what decides a text beside files: the environment, the folder, and the Python with its paths."""
    environment = sorted(item for item in os.environ.items() if item[0] not in PASSING)
    return [environment, os.getcwd(), sys.version, sys.prefix, sys.path]


class Index:
    """The place of one text."""

    def __init__(self, *words: object) -> None:
        self._begun = time.time()
        # a digest, as values of the environment may be secrets
        self._path = os.path.join(folder(), f"{_digest(repr(words).encode(errors='surrogatepass'))}.json")
        self.text = self._read()
        """The kept text while all that decides it is as it was, or None."""

    def _read(self) -> str | None:
        try:
            with open(self._path, "rb") as stream:
                digest, _, content = stream.read().partition(b"\n")
            if digest.decode() != _digest(content):
                return None
            kept = json.loads(content)
            return str(kept["text"]) if kept["state"] == _digest(b"".join(_states(kept["paths"]))) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, text: str, paths: Iterable[str]) -> None:
        """Keep a text with the files and folders that decide it, unless one of them changed in the meantime."""
        known = sorted(set(paths))
        state, latest = _digest(b"".join(_states(known))), max(map(_changed, known), default=0.0)
        if latest > self._begun - RECENT:
            return
        content = json.dumps({"text": text, "state": state, "paths": known}).encode()
        unfinished = f"{self._path}.{os.getpid()}.tmp"
        try:
            os.makedirs(folder(), mode=0o700, exist_ok=True)
            with open(unfinished, "wb") as stream:
                stream.write(_digest(content).encode() + b"\n" + content)
            os.replace(unfinished, self._path)
            _make_room()
        except OSError:  # a text is found without its index, too
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


_command: Index | None = None


def use(words: Sequence[str]) -> None:
    """Take the index of the command that this process is for; another program may have more than files decide."""
    global _command
    _command = Index(words, situation())


def of_command() -> Index | None:
    """Return the index of this process's command, or None without one."""
    return _command


def files_below(*folders: str) -> Iterator[str]:
    """Yield folders with all that is in them, but for compiled Python."""
    for start in folders:
        yield start
        for root, inner, names in os.walk(start):
            inner[:] = [name for name in inner if name != "__pycache__"]
            yield from (os.path.join(root, name) for name in (*inner, *names))


def files_of_python() -> Iterator[str]:
    """Yield the files of every loaded module but the standard library's, and those that name the distributions."""
    standard = os.path.join(os.path.dirname(os.__file__), "")
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and (not file.startswith(standard) or "-packages" in file):
            yield from (file, os.path.dirname(file))
    for place in sys.path:
        yield place or "."
        with contextlib.suppress(OSError), os.scandir(place or ".") as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info")):
                    yield from (os.path.join(entry.path, name) for name in ("METADATA", "PKG-INFO", "entry_points.txt"))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _states(paths: Iterable[str]) -> Iterator[bytes]:
    """Yield the state of each file or folder: another one after every change of it, of its name or of its place."""
    for path in paths:
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            yield b"absent;"
        else:
            yield b"%d %d %d %d;" % (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


def _changed(path: str) -> float:
    """Return the time of a file's last change, 0 for one that is absent."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return 0.0
    return max(found.st_mtime, found.st_ctime)


def _make_room() -> None:
    with os.scandir(folder()) as entries:
        found = sorted((entry.stat().st_mtime, entry.path) for entry in entries)
    for _, path in found[:-MOST_KEPT]:
        os.unlink(path)
