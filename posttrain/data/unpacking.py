"""Files as streams of bytes, compressed ones unpacked, within bounds."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from posttrain.errors import first_line, reject

PACKED = {".gz": "gzip", ".zst": "zstd"}
"""Names of the compressions in Arrow, by ending."""
MOST_TIMES = 250
"""Bytes to which a byte of a file may unpack: prose reaches 10, tables of one repeated row 200, a bomb a thousand."""
ALWAYS_UNPACKED = 2**26
"""Bytes to which any file may unpack, however small."""


def most_unpacked(path: Path) -> int:
    """Return the bytes to which a file may unpack: 250 times its size, or 64 MiB when that is more."""
    return max(ALWAYS_UNPACKED, MOST_TIMES * path.stat().st_size)


def reject_bomb(place: str, most: int) -> None:
    """Raise BadInput for a file that unpacks to more than ``most`` bytes."""
    what = f"unpacks to more than {most:,} bytes, {MOST_TIMES} times its size and {ALWAYS_UNPACKED:,}"
    reject(place, what, "Unpack it, if it is what it should be")


@contextlib.contextmanager
def opened(path: Path, place: str) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked when its ending names a compression.

    Raises:
        BadInput: While reading: the file is damaged or cut, or unpacks to more than ``most_unpacked``.
    """
    if path.suffix not in PACKED:
        with path.open("rb") as file:
            yield file
        return
    with _Unpacked(path, place) as stream:
        yield cast("BinaryIO", io.BufferedReader(stream, 1 << 17))


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a file."""

    def __init__(self, path: Path, place: str) -> None:
        import pyarrow

        self._place, self._most, self._size = place, most_unpacked(path), 0
        self._stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), PACKED[path.suffix])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            reject(self._place, f"is damaged or cut: {first_line(error)}", "Pack it again")
        self._size += len(data)
        if self._size > self._most:
            reject_bomb(self._place, self._most)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
