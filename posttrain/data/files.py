"""Rows of local files: JSON, JSONL, Parquet and plain text, each row with the place it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from posttrain.errors import nearest, reject

LONGEST_LINE = 2**26
"""Bytes of a line of JSONL: more is no record, and would only fill the memory."""

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]


def rows(path: Path) -> Rows:
    """Yield ``(where, row)`` for every record of one file, reading JSONL and Parquet piece by piece.

    ``where`` is ``file:line`` (JSONL, counted from 1) or ``file[index]`` (counted from 0). A text file is one row with
    the key ``text``. Raises BadInput for anything else that is not a file of JSON objects, naming the line.
    """
    found = False
    try:
        for found_row in READERS[path.suffix](path):
            found = True
            yield found_row
    except OSError as error:
        reject(str(path), f"cannot be read: {error.strerror or error}")
    if not found:
        reject(str(path), "holds no records")


def local_files(name: str) -> list[Path] | None:
    """The files that ``name`` stands for, or None when it can only be the name of a hub dataset."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.exists():
        return [_checked_file(path)]
    if path.is_symlink():
        reject(name, "is a link that leads to no file")
    if path.suffix in READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        reject(name, "no such file or directory", _sibling(path))
    return None


def _directory(path: Path) -> list[Path]:
    files = sorted(entry for entry in path.iterdir() if entry.suffix in READERS and not entry.name.startswith("."))
    # beside data, a text file is a note about it
    files = [file for file in files if file.suffix != TEXT] or files
    if not files:
        reject(str(path), f"the directory holds no file of {', '.join(READERS)}")
    return [_checked_file(entry) for entry in files]


def _checked_file(path: Path) -> Path:
    if not path.is_file():
        reject(str(path), "is not a regular file")
    if path.suffix not in READERS:
        reject(str(path), f"the ending {path.suffix!r} is not known", f"Known: {', '.join(READERS)}")
    return path


def _sibling(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The directory {path.parent} does not exist either"
    close = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return f"Did you mean {path.parent / close}?" if close else ""


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if len(line) > LONGEST_LINE:
                reject(
                    f"{path}:{number}", f"the line is longer than {LONGEST_LINE:,} bytes", "Put one record on a line"
                )
            text = _text(line, path, number).strip()
            if text:
                where = f"{path}:{number}"
                yield where, _object(_parsed(text, path, number), where)


def _json(path: Path) -> Rows:
    text = _text(path.read_bytes(), path, 1)
    if not text.strip():
        return
    values = _parsed(text, path, 1)
    if not isinstance(values, list):
        reject(str(path), f"holds {_kind(values)}, not an array", "One object per line belongs in a .jsonl file")
    for index, value in enumerate(values):
        where = f"{path}[{index}]"
        yield where, _object(value, where)


def _whole_text(path: Path) -> Rows:
    text = _text(path.read_bytes(), path, 1)
    if text.strip():
        yield str(path), {"text": text}


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    index = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}[{index}]", row
                    index += 1
    except pyarrow.ArrowException as error:
        reject(str(path), f"is not a sound Parquet file: {str(error).splitlines()[0]}")


TEXT = ".txt"
READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    TEXT: _whole_text,
}
"""How each kind of file is read, by its ending."""


def _text(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        reject(f"{path}:{line}", f"is not UTF-8: byte 0x{data[error.start]:02x}", "Convert the file to UTF-8")


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where, why = f"{path}:{line + error.lineno - 1}", f"{error.msg}, column {error.colno}"
    except ValueError as error:
        where, why = f"{path}:{line}", str(error)
    except RecursionError:
        where, why = f"{path}:{line}", "nested too deeply"
    fix = "Each line must be one JSON object; an array belongs in a .json file"
    reject(where, f"is not valid JSON: {why}", fix if path.suffix == ".jsonl" else "")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return keys


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        reject(where, f"a record must be an object, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
