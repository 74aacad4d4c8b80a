"""Rows of local files: JSON, JSONL, Parquet and plain text, each row with its place.

A new kind of file is one entry of ``FORMATS``, at the end: reading, counting, directories and gates go by this table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from posttrain.errors import nearest, reject

LONGEST_LINE = 2**26
"""Bytes of the longest line of JSONL: a longer one is no record, and would only fill the memory."""
COUNTED_BYTES = 64_000_000
"""Size of the largest file whose lines are counted: a few hundredths of a second."""
PARSED_BYTES = 8_000_000
"""The same for a JSON array, parsed as a whole."""

RawRow = dict[str, Any]
"""One record under the keys of its file, before its shape is recognised."""
Rows = Iterator[tuple[str, RawRow]]
"""Rows with their places: ``file:line`` counted from 1, or ``file[index]`` counted from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFormat:
    """One kind of file, found by its ending."""

    read: Callable[[Path], Rows]
    """Yields the rows; raises BadInput at the place of a fault."""
    count: Callable[[Path], int | None] | None = None
    """Counts the rows without reading them as records; returns None for a damaged file."""
    largest_counted: float = math.inf
    """Bytes of the largest file worth counting."""
    datasets_builder: str | None = None
    """Builder of ``datasets`` for such files, by which lm-eval reads a gate's ``data``; None for no such use."""
    is_note: bool = False
    """True for a note about the data beside it."""


def read_rows(path: Path) -> Rows:
    """Yield ``(where, row)`` for every record of one file, JSONL and Parquet piece by piece.

    A text file is one row with the key ``text``.

    Raises:
        BadInput: The file cannot be read, holds no records, or a record is no JSON object; names the line.
    """
    found = False
    try:
        for found_row in FORMATS[path.suffix].read(path):
            found = True
            yield found_row
    except OSError as error:
        reject(str(path), f"cannot be read: {error.strerror or error}")
    if not found:
        reject(str(path), "holds no records")


def count_rows(path: Path) -> int | None:
    """Return the number of rows in one file; None when counting takes long or the ending is unknown."""
    known = FORMATS.get(path.suffix)
    if known is None or known.count is None or path.stat().st_size > known.largest_counted:
        return None
    return known.count(path)


def local_files(name: str) -> list[Path] | None:
    """Return the files behind ``name``, or None when it can only be the name of a hub dataset.

    Raises:
        BadInput: ``name`` looks like a path but leads to no readable file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _list_directory(path)
    if path.exists():
        return [_check_file(path)]
    if path.is_symlink():
        reject(name, "is a broken link")
    if path.suffix in FORMATS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        reject(name, "no such file or directory", _suggest_sibling(path))
    return None


def _list_directory(path: Path) -> list[Path]:
    files = sorted(entry for entry in path.iterdir() if entry.suffix in FORMATS and not entry.name.startswith("."))
    files = [file for file in files if not FORMATS[file.suffix].is_note] or files
    if not files:
        reject(str(path), f"the directory holds no file of {', '.join(FORMATS)}")
    return [_check_file(entry) for entry in files]


def _check_file(path: Path) -> Path:
    if not path.is_file():
        reject(str(path), "is not a regular file")
    if path.suffix not in FORMATS:
        reject(str(path), "unknown ending", f"Known: {', '.join(FORMATS)}")
    return path


def _suggest_sibling(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The directory {path.parent} does not exist either"
    close = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return f"Did you mean {path.parent / close}?" if close else ""


# --- Readers ----------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Rows:
    fix = "Each line must be one JSON object; an array belongs in a .json file"
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            where = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                reject(where, f"the line is longer than {LONGEST_LINE:,} bytes", "Put one record on a line")
            text = _decode(line, path, number).strip()
            if text:
                yield where, _check_object(_parse(text, path, number, fix), where)


def _read_json(path: Path) -> Rows:
    text = _decode(path.read_bytes(), path, 1)
    if not text.strip():
        return
    values = _parse(text, path, 1)
    if not isinstance(values, list):
        reject(str(path), f"holds {_kind(values)}, not an array", "One object per line belongs in a .jsonl file")
    for index, value in enumerate(values):
        where = f"{path}[{index}]"
        yield where, _check_object(value, where)


def _read_text(path: Path) -> Rows:
    text = _decode(path.read_bytes(), path, 1)
    if text.strip():
        yield str(path), {"text": text}


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield (
                        f"{path}[{index}]",
                        {field.name: drop_filled(row[field.name], field.type) for field in batch.schema},
                    )
                    index += 1
    except pyarrow.ArrowException as error:
        reject(str(path), f"is not a sound Parquet file: {str(error).splitlines()[0]}")


def drop_filled(value: Any, kind: Any) -> Any:
    """Return a value of a table without the fields that are null in its objects, at any depth.

    A column of objects has the keys of all its rows, null where a row lacks one. An entry of a list, of a map or of
    JSON is the row's own, even when it is null. ``kind`` is the Arrow type; when it is None, every object is a struct.
    """
    import pyarrow

    if isinstance(value, dict) and (kind is None or pyarrow.types.is_struct(kind)):
        kinds = {} if kind is None else {field.name: field.type for field in kind}
        return {key: drop_filled(item, kinds.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, dict) and pyarrow.types.is_map(kind):
        return {key: drop_filled(item, kind.item_type) for key, item in value.items()}
    if isinstance(value, list) and (kind is None or hasattr(kind, "value_type")):
        return [drop_filled(item, getattr(kind, "value_type", None)) for item in value]
    return value


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        # Windows editors put a byte order mark before the first line.
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        reject(f"{path}:{line}", f"is not UTF-8: byte 0x{data[error.start]:02x}", "Convert the file to UTF-8")


def _parse(text: str, path: Path, line: int, fix: str = "") -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where, why = f"{path}:{line + error.lineno - 1}", f"{error.msg}, column {error.colno}"
    except ValueError as error:
        where, why = f"{path}:{line}", str(error)
    except RecursionError:
        where, why = f"{path}:{line}", "nested too deeply"
    reject(where, f"is not valid JSON: {why}", fix)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in an object")
    return keys


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


# Stricter than Python's own: a second key, NaN and 1e400 would each lose what the author wrote without a word.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_reject_constant, parse_float=_finite)


def _check_object(value: Any, where: str) -> RawRow:
    if not isinstance(value, dict):
        reject(where, f"a record must be an object, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


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


def _count_table_rows(path: Path) -> int | None:
    import pyarrow
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(path).num_rows)
    except pyarrow.ArrowException:
        return None


FORMATS: dict[str, FileFormat] = {
    ".json": FileFormat(read=_read_json, count=_count_elements, largest_counted=PARSED_BYTES, datasets_builder="json"),
    ".jsonl": FileFormat(read=_read_jsonl, count=_count_lines, largest_counted=COUNTED_BYTES, datasets_builder="json"),
    ".parquet": FileFormat(read=_read_parquet, count=_count_table_rows, datasets_builder="parquet"),
    ".txt": FileFormat(read=_read_text, is_note=True),
}
"""The known kinds of files by ending."""
