"""Readers of JSON, JSONL and plain text, stricter than Python's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from posttrain.data.rows import BadRow, Found, RawRow, bad_row
from posttrain.errors import BadInput, reject

LONGEST_LINE = 2**26
"""Bytes of the longest line of JSONL: a longer one is no record, and would only fill the memory."""

_ONE_A_LINE = "Each line must be one JSON object; an array belongs in a .json file"


def read_jsonl(file: BinaryIO, place: str) -> Iterator[Found]:
    """Yield the objects of a file of lines, and the lines that hold none."""
    for number, line in numbered_lines(file):
        where = f"{place}:{number}"
        try:
            if len(line) > LONGEST_LINE:
                yield too_long(where, "Put one record on a line")
                continue
            text = decode(line, place, number).strip()
        except BadInput as error:
            yield bad_row(error, "encoding")
            continue
        if text:
            yield _read_line(text, place, number)


def read_json(file: BinaryIO, place: str) -> Iterator[Found]:
    """Yield the objects of an array, and its elements that are none; raises BadInput for anything but an array."""
    text = decode(file.read(), place, 1)
    if not text.strip():
        return
    values = _parse(text, place, 1)
    if not isinstance(values, list):
        reject(place, f"holds {_kind(values)}, not an array", "One object per line belongs in a .jsonl file")
    for index, value in enumerate(values):
        yield _object(value, f"{place}[{index}]")


def read_text(file: BinaryIO, place: str) -> Iterator[Found]:
    """Yield a file as one row with the key ``text``, or as one bad row."""
    try:
        text = decode(file.read(), place, 1)
    except BadInput as error:
        yield bad_row(error, "encoding")
        return
    if text.strip():
        yield place, {"text": text}


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers from 1, of a line too long only the first bytes, one more than allowed."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        rest = line
        while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE + 1)
        yield number, line


def too_long(where: str, fix: str) -> BadRow:
    """Return the row in a line too long."""
    what = f"the line is longer than {LONGEST_LINE:,} bytes"
    return BadRow(where=where, kind="length", what=what, fix=fix)


def decode(data: bytes, place: str, line: int) -> str:
    """Return bytes of UTF-8 as text; raises BadInput at the line of a byte that is none."""
    try:
        # Windows editors put a byte order mark before the first line.
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        reject(f"{place}:{line}", f"is not UTF-8: byte 0x{data[error.start]:02x}", "Convert the file to UTF-8")


def _read_line(text: str, place: str, number: int) -> Found:
    try:
        return _object(_parse(text, place, number, _ONE_A_LINE), f"{place}:{number}")
    except BadInput as error:
        return bad_row(error, "JSON")


def _object(value: Any, where: str) -> tuple[str, RawRow] | BadRow:
    if isinstance(value, dict):
        return where, value
    return BadRow(where=where, kind="shape", what=f"a record must be an object, not {_kind(value)}")


def _parse(text: str, place: str, line: int, fix: str = "") -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where, why = f"{place}:{line + error.lineno - 1}", f"{error.msg}, column {error.colno}"
    except ValueError as error:
        where, why = f"{place}:{line}", str(error)
    except RecursionError:
        where, why = f"{place}:{line}", "nested too deeply"
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


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
