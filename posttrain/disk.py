"""Durable files: a crash leaves the old content or the new, never a part of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_synced(path: Path, text: str) -> None:
    """Write a text file and sync it to disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
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


def sync(path: Path) -> None:
    """Flush the system's buffers of a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
