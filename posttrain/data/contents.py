"""Digests of files, remembered by size, times and inode, so that a second start hashes no file again."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from posttrain.digests import canonical, digest_of, file_digest
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.saved import plain, read_as

SECOND_NS = 1_000_000_000
COARSE_NS, FINE_NS = 2 * SECOND_NS, SECOND_NS // 10
"""Age below which a file's times prove nothing, in nanoseconds: two writes within a tick of the clock of a file system
leave the same times. FAT has ticks of 2 s; where times have parts of a second, a kernel's tick is 10 ms at most."""
MOST_FILES = 10_000
"""Files remembered, those hashed last."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """The digest of a file in the state that these figures describe."""

    size: int
    modified_ns: int
    changed_ns: int
    """Time of the last change of content, name or rights: no tool sets it back."""
    inode: int
    device: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class _Saved:
    files: dict[str, Known]
    proof: str
    """Digest of ``files``."""


class Contents:
    """The digests of files, kept in one file; a damaged or foreign one is as good as none."""

    def __init__(self, kept: Path | None) -> None:
        self._kept = kept
        self._known = {} if kept is None else _load(kept)
        self._is_changed = False

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a file: the remembered one when the file is the same by all figures, else hashed."""
        name, began, before = str(path.absolute()), time.time_ns(), path.stat()
        known = self._known.get(name)
        if known is not None and known == _figures(before, known.digest):
            return known.digest
        digest = file_digest(path)
        found = _figures(before, digest)
        if _is_settled(before, began) and found == _figures(path.stat(), digest):
            self._known.pop(name, None)  # to the end: the first ones are forgotten first
            self._known[name] = found
            self._is_changed = True
        return digest

    def save(self) -> None:
        """Write the digests, if there are new ones; a disk that takes no file costs time at the next start, no more."""
        if self._kept is None or not self._is_changed:
            return
        files = {name: plain(known) for name, known in list(self._known.items())[-MOST_FILES:]}
        with contextlib.suppress(OSError):
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._kept, canonical({"files": files, "proof": digest_of(files)}))
            self._is_changed = False


def _load(kept: Path) -> dict[str, Known]:
    if not kept.exists():
        return {}
    try:
        saved = read_as(_Saved, kept)
    except ArtifactDamaged:
        return {}
    files = {name: plain(known) for name, known in saved.files.items()}
    return dict(saved.files) if digest_of(files) == saved.proof else {}


def _is_settled(found: os.stat_result, now: int) -> bool:
    """Return whether a write from ``now`` on, in nanoseconds, would give the file other times."""
    times = found.st_mtime_ns, found.st_ctime_ns
    return max(times) < now - (FINE_NS if all(each % SECOND_NS for each in times) else COARSE_NS)


def _figures(found: os.stat_result, digest: str) -> Known:
    return Known(
        size=found.st_size, modified_ns=found.st_mtime_ns, changed_ns=found.st_ctime_ns, inode=found.st_ino,
        device=found.st_dev, digest=digest,
    )  # fmt: skip
