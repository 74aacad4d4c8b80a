"""Files of records: their kinds by ending, the files behind a name, and their rows with their places.

A new kind of file is one entry of ``FORMATS``, at the end: reading, counting, directories and gates go by this table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from posttrain.data.rows import BadRow, Found, Rows, strict
from posttrain.data.tables import count_table_rows, read_csv, read_parquet, read_tsv
from posttrain.data.texts import read_json, read_jsonl, read_text
from posttrain.data.unpacking import PACKED, opened
from posttrain.errors import nearest, reject
from posttrain.host import readers
from posttrain.host.readers import Reader

COUNTED_BYTES = 64_000_000
"""Size of the largest file whose lines are counted: a few hundredths of a second."""
PARSED_BYTES = 8_000_000
"""The same for a JSON array, which has to be parsed."""

WILDCARDS = "*?["
"""Characters that make a name a pattern."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFormat:
    """One kind of file, found by its ending."""

    read: Callable[[BinaryIO, str], Iterator[Found]]
    """Yields the rows and the bad rows of an open file under its name; raises BadInput where nothing can be read on."""
    count: Callable[[Path], int | None] | None = None
    """Counts the rows without reading them as records; returns None for a damaged file."""
    largest_counted: float = math.inf
    """Bytes of the largest file worth counting."""
    datasets_builder: str | None = None
    """Builder of ``datasets`` for such files, by which lm-eval reads a gate's ``data``; None for no such use."""
    is_note: bool = False
    """True for a note about the data beside it."""
    is_text: bool = True
    """True for a file that is read from front to end, and so may be compressed."""
    identity: str = ""
    """Name and version of a plugin's reader, on which the records depend; empty for the formats of this table."""


def format_of(path: Path) -> FileFormat | None:
    """Return the kind of a file by its ending, below that of its compression; None for an unknown one."""
    if path.suffix not in PACKED:
        return _format(path.suffix)
    known = _format(Path(path.stem).suffix)
    return known if known is not None and known.is_text else None


def known_endings() -> str:
    """Return the endings of files in words."""
    return f"{', '.join((*FORMATS, *readers.known))}; texts also with {' or '.join(PACKED)} behind"


def _format(suffix: str) -> FileFormat | None:
    reader = readers.known.get(suffix)
    if reader is None:
        return FORMATS.get(suffix)
    return FileFormat(read=partial(_read_registered, reader), identity=f"{reader.name} {reader.version}")


def _read_registered(reader: Reader, file: BinaryIO, place: str) -> Iterator[Found]:
    for line, row in reader.read(file):
        where = f"{place}:{line}"
        yield BadRow(where=where, kind=reader.name, what=row) if isinstance(row, str) else (where, dict(row))


def read_found(path: Path, place: str | None = None) -> Iterator[Found]:
    """Yield ``(where, row)`` or a BadRow for every record of one file, piece by piece.

    A text file is one row with the key ``text``. ``place`` is the name of the file in messages, by default its path.

    Raises:
        BadInput: The file cannot be read to its end, or holds no records.
    """
    place, known, found = place or str(path), format_of(path), False
    if known is None:
        reject(place, "unknown ending", f"Known: {known_endings()}")
    try:
        with opened(path, place) as file:
            for each in known.read(file, place):
                found = True
                yield each
    except OSError as error:
        reject(place, f"cannot be read: {error.strerror or error}")
    if not found:
        reject(place, "holds no records")


def read_rows(path: Path) -> Rows:
    """Yield ``(where, row)`` for every record of one file; raises BadInput at the first one that cannot be read."""
    return strict(read_found(path))


def count_rows(path: Path) -> int | None:
    """Return the number of rows in one file; None when counting takes long or the ending is unknown."""
    known = _format(path.suffix)
    if known is None or known.count is None or path.stat().st_size > known.largest_counted:
        return None
    return known.count(path)


def local_files(name: str) -> list[Path] | None:
    """Return the files behind ``name``, or None when it can only be the name of a hub dataset.

    Raises:
        BadInput: ``name`` looks like a path or a pattern but leads to no readable file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _list_directory(path)
    if path.exists():
        return [_check_file(path)]
    if path.is_symlink():
        reject(name, "is a broken link")
    if any(mark in name for mark in WILDCARDS):
        return _list_pattern(name, path)
    if format_of(path) is not None or name.startswith((".", "/", "~")) or name.count("/") > 1:
        reject(name, "no such file or directory", suggest_sibling(path))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        what, fix = "no such file or directory, and not a hub name", "A hub dataset is named owner/name"
        reject(name, what, suggest_sibling(path) or fix)
    if path.parent.is_dir():
        reject(name, "no such file or directory", suggest_sibling(path) or f"Give a file of the folder {path.parent}")
    return None


def _list_directory(path: Path) -> list[Path]:
    files = sorted(entry for entry in path.iterdir() if _is_data(entry))
    files = [file for file in files if not _is_note(file)] or files
    if not files:
        reject(str(path), f"the directory holds no file of {known_endings()}")
    return [_check_file(entry) for entry in files]


def _list_pattern(name: str, path: Path) -> list[Path]:
    """Return the files of a pattern in the order of their paths; ``**`` stands for folders of any depth."""
    parts = path.parts
    first = next(index for index, part in enumerate(parts) if any(mark in part for mark in WILDCARDS))
    root = Path(*parts[:first])
    files = sorted(file for file in root.glob(str(Path(*parts[first:]))) if not file.is_dir() and _is_data(file))
    if not files:
        found = f"no file of {known_endings()} matches" if root.is_dir() else f"there is no directory {root}"
        reject(name, found, "** stands for folders of any depth")
    return [_check_file(file) for file in files]


def _is_data(path: Path) -> bool:
    return format_of(path) is not None and not path.name.startswith(".")


def _is_note(path: Path) -> bool:
    known = format_of(path)
    return known is not None and known.is_note


def _check_file(path: Path) -> Path:
    if not path.is_file():
        reject(str(path), "is not a regular file")
    if format_of(path) is None:
        reject(str(path), "unknown ending", f"Known: {known_endings()}")
    return path


def suggest_sibling(path: Path) -> str:
    """Return the fix of a path that leads nowhere: the file beside it that is most like it; empty when none is."""
    if not path.parent.is_dir():
        return f"The directory {path.parent} does not exist either"
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = nearest(path.name, names)
    if close is None:  # the ending may be left out
        stems = {name.split(".")[0]: name for name in names if _is_data(path.parent / name)}
        stem = path.name.split(".")[0]
        close = stems.get(stem) or stems.get(nearest(stem, stems) or "")
    return f"Did you mean {path.parent / close}?" if close else ""


# --- Counters: a damaged file is reported where its rows are read, not here -------------------------------------------


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if not line.isspace())


def _count_elements(path: Path) -> int | None:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return len(values) if isinstance(values, list) else None


FORMATS: dict[str, FileFormat] = {
    ".json": FileFormat(read=read_json, count=_count_elements, largest_counted=PARSED_BYTES, datasets_builder="json"),
    ".jsonl": FileFormat(read=read_jsonl, count=_count_lines, largest_counted=COUNTED_BYTES, datasets_builder="json"),
    ".parquet": FileFormat(read=read_parquet, count=count_table_rows, datasets_builder="parquet", is_text=False),
    ".csv": FileFormat(read=read_csv),
    ".tsv": FileFormat(read=read_tsv),
    ".txt": FileFormat(read=read_text, is_note=True),
}
"""The known kinds of files by ending."""
