"""A power cut at any moment: what a disk may hold of the writes, syncs and renames before it.

A file system promises little: a file holds at least what it held at its last sync, and a folder lists at least the
names of its own last sync. All that came later may be there, or not, or half. ``recorded`` keeps both sides of every
moment by watching the calls that change or sync a tree. ``images`` builds the disks that may be found after each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHANGES = ("rename", "replace", "mkdir", "rmdir", "unlink", "remove")
"""Calls after which a folder lists other names."""


@dataclass(frozen=True)
class Moment:
    """The disk between two calls; files and folders by number of inode."""

    call: str
    names: dict[int, dict[str, int]]
    """Entries of every folder, as a running system sees them."""
    synced_names: dict[int, dict[str, int]]
    """Entries of every folder at its last sync; a folder that never was has none."""
    bytes_of: dict[int, bytes]
    synced_bytes: dict[int, bytes]
    root: int


@dataclass
class Recorder:
    """Moments of one tree."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    _names: dict[int, dict[str, int]] = field(default_factory=dict)
    _bytes: dict[int, bytes] = field(default_factory=dict)
    _held: dict[int, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Take everything that is there for synced."""
        names, data = self._scan()
        self._names, self._bytes = names, dict(data)

    def note(self, call: str) -> None:
        """Keep the present moment."""
        names, data = self._scan()
        synced = dict(self._names), dict(self._bytes)
        self.moments.append(Moment(call, names, synced[0], data, synced[1], self.root.stat().st_ino))

    def synced(self, path: Path) -> None:
        """Keep what a sync of ``path`` makes durable."""
        if path != self.root and self.root not in path.parents:
            return
        if path.is_dir():
            self._names[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._bytes[path.stat().st_ino] = path.read_bytes()
        self.note(f"fsync {path.relative_to(self.root)}")

    def close(self) -> None:
        """Let go of the files that were held so that no inode's number is used twice."""
        for descriptor in self._held.values():
            os.close(descriptor)

    def _scan(self) -> tuple[dict[int, dict[str, int]], dict[int, bytes]]:
        names: dict[int, dict[str, int]] = {}
        data: dict[int, bytes] = {}
        for folder, _, files in os.walk(self.root):
            names[os.stat(folder).st_ino] = {entry.name: entry.inode() for entry in os.scandir(folder)}
            self._hold(Path(folder))
            for name in files:
                path = Path(folder, name)
                self._hold(path)
                data[path.stat().st_ino] = path.read_bytes()
        return names, data

    def _hold(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)


@contextmanager
def recorded(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Record every moment of the tree ``root`` while the context lasts."""
    recorder = Recorder(root)
    recorder.begin()

    def watch(name: str) -> None:
        original: Callable[..., Any] = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            recorder.note(f"before {name}")  # what was written since the last call, unsynced
            result = original(*args, **kwargs)
            recorder.note(name)
            return result

        patch.setattr(os, name, call)

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        recorder.note("before fsync")
        original_fsync(descriptor)
        recorder.synced(path)

    original_fsync = os.fsync
    try:
        with monkeypatch.context() as patch:
            for name in CHANGES:
                watch(name)
            patch.setattr(os, "fsync", fsync)
            yield recorder
    finally:
        recorder.close()


LOSSES: dict[str, Callable[[bytes, bytes | None], bytes]] = {
    "kept": lambda now, synced: now,
    "dropped": lambda now, synced: b"" if synced is None else synced,
    "zeroed": lambda now, synced: bytes(len(now)),
    "torn": lambda now, synced: now[: len(now) // 2],
}
"""What may be left of a file whose last bytes were not synced."""


def images(recorder: Recorder, folder: Path) -> Iterator[tuple[str, Path]]:
    """Build each disk that may be found after a power cut, below ``folder``, each of them once.

    Names that were not synced are all there or all missing; bytes that were not are lost in each of four ways.
    """
    seen = set[int]()
    for number, moment in enumerate(recorder.moments):
        for loss in LOSSES:
            for names in ("names kept", "names dropped"):
                files = dict(_files(moment, loss, names == "names kept", moment.root, Path()))
                if (key := hash(frozenset(files.items()))) in seen:
                    continue
                seen.add(key)
                image = folder / f"{number}-{loss}-{names.replace(' ', '-')}"
                for relative, content in files.items():
                    (image / relative).parent.mkdir(parents=True, exist_ok=True)
                    if content is not None:
                        (image / relative).write_bytes(content)
                    else:
                        (image / relative).mkdir(exist_ok=True)
                yield f"after {moment.call} ({number}), {loss}, {names}", image


def _files(moment: Moment, loss: str, kept: bool, folder: int, path: Path) -> Iterator[tuple[Path, bytes | None]]:
    """Yield the files of a folder of the image with their bytes, and its folders with None."""
    listed = moment.names.get(folder, {}) if kept else moment.synced_names.get(folder, {})
    for name, inode in listed.items():
        if inode in moment.names or inode in moment.synced_names:
            yield path / name, None
            yield from _files(moment, loss, kept, inode, path / name)
            continue
        synced = moment.synced_bytes.get(inode)
        now = moment.bytes_of.get(inode, synced if synced is not None else b"")
        yield path / name, now if now == synced else LOSSES[loss](now, synced)
