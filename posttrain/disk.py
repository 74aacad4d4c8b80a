"""Durable files, locks, and errors of the disk under the name of the file."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from posttrain.errors import BadInput, DiskFailed, PosttrainError, Problem, is_out_of_memory

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a full or failing disk: nobody's fault, and with some room the same command resumes."""
PLACE_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
"""Errors of a path that this user cannot read or write, for good."""
ON_WINDOWS = os.name == "nt"


def is_machine_error(error: BaseException) -> bool:
    """Return True for a full or failing disk, and for memory that ran out: no fault of a plugin or of a file."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in DISK_ERRORS)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in an OSError without a file: a write knows only its descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def explain_error(error: OSError, fallback: Path | None = None) -> PosttrainError | None:
    """Return an error of the disk or of a path as one with an exit code; None for any other, which is a bug.

    Names the file of the error, or ``fallback``, and the room left beside it.
    """
    place = error.filename2 or error.filename or fallback
    if error.errno in DISK_ERRORS:
        room = "" if place is None else f" ({_free(Path(str(place))):,} bytes free)"
        fix = "Nothing published is lost: make room and run the same command again"
        return DiskFailed(Problem(where=str(place or "a file"), what=f"{error.strerror}{room}", fix=fix))
    if error.errno in PLACE_ERRORS and place is not None:
        fix = "Give files and an output_root that this user can read and write"
        return BadInput(Problem(where=str(place), what=f"cannot be read or written: {error.strerror}", fix=fix))
    return None


def require_writable(folder: Path) -> None:
    """Create ``folder`` and write a byte into it. Raises BadInput naming it when that fails."""
    probe = folder / f".probe.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_synced(probe, "?")
    except OSError as error:
        error.filename, error.filename2 = str(folder), None
        known = explain_error(error)
        raise known or BadInput(Problem(where=str(folder), what=f"cannot be written: {error.strerror}")) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def write_synced(path: Path, text: str) -> None:
    """Write a text file and sync it to disk."""
    with naming(path), path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def append_synced(path: Path, line: bytes) -> None:
    """Append to a file in one write and sync it to disk."""
    with naming(path), path.open("ab", buffering=0) as stream:
        if stream.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a text file in one step, so that a reader sees the old text or the new; several may write at once."""
    # A name of its own for each writer: two of them never write into one draft, and the last rename wins.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_synced(draft, text)
        draft.replace(path)
        sync(path.parent)  # the new name is an entry of the folder; without this a power cut may bring the old one back
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def read_at(file: int, size: int, place: int) -> bytes:
    """Return ``size`` bytes of an open file from ``place``, or fewer at its end."""
    if hasattr(os, "pread"):
        return os.pread(file, size, place)
    os.lseek(file, place, os.SEEK_SET)  # Windows
    return os.read(file, size)


def lock(stream: IO[Any], *, wait: bool = True) -> bool:
    """Lock an open file for this process alone; closing it, and the end of the process however it comes, unlocks it.

    Return False when another process holds it and is not to be waited for.
    """
    import portalocker  # flock, and what Windows has in its place

    flags = portalocker.LockFlags.EXCLUSIVE
    try:
        portalocker.lock(stream, flags if wait else flags | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked:
        return False
    return True


def sync(path: Path) -> None:
    """Flush the system's buffers of a file or folder to disk."""
    if ON_WINDOWS and path.is_dir():  # it opens no folder, and writes a name with its file
        return
    with naming(path):
        descriptor = os.open(path, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _free(path: Path) -> int:
    """Return the bytes free on the disk of ``path``, which need not exist."""
    existing = next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))
    return shutil.disk_usage(existing).free
