"""Readers of JSON, JSONL and plain text, stricter than Python's own."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO, NoReturn

from posttrain.data.rows import BadRow, Found, RawRow, bad_row
from posttrain.errors import BadInput, reject

LONGEST_LINE = 2**26
"""Bytes of the longest line of JSONL: a longer one is no record, and would only fill the memory."""
LONGEST_ELEMENT = LONGEST_LINE
"""Characters of the longest element of a JSON array."""
PIECE = 2**16
"""Bytes of a JSON array that are read at once."""

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
    """Yield the objects of an array, and its elements that are none, piece by piece.

    Raises BadInput for anything but an array, and where it is faulty: the elements before that place have been yielded.
    """
    window = _Window(file, place)
    mark = window.next()
    if not mark:
        return
    if mark != "[":
        other = window.value(place)
        if window.next():
            window.reject("Extra data", window.at)
        reject(place, f"holds {_kind(other)}, not an array", "One object per line belongs in a .jsonl file")
    for index in () if window.next(1) == "]" else count():
        where = f"{place}[{index}]"
        yield _object(window.value(where), where)
        mark = window.next()
        if mark == "]":
            break
        if mark != ",":
            window.reject("Expecting ',' delimiter", window.at)
        window.next(1)
    if window.next(1):
        window.reject("Extra data", window.at)


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
        _reject_bytes(place, line, error)


def _reject_bytes(place: str, line: int, error: UnicodeDecodeError) -> NoReturn:
    """Raise BadInput for bytes that begin on a line and are no UTF-8."""
    byte, lines = error.object[error.start], error.object.count(b"\n", 0, error.start)
    reject(f"{place}:{line + lines}", f"is not UTF-8: byte 0x{byte:02x}", "Convert the file to UTF-8")


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

LONGEST_WORD = len("-Infinity")
_SPACE = re.compile(r"[ \t\n\r]*")


class _Window:
    """The part of a JSON text that is being read: from the value under way to the last piece read of the file."""

    def __init__(self, file: BinaryIO, place: str) -> None:
        self._file, self._place = file, place
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()  # Windows editors put a byte order mark
        self._text, self._is_last = "", False
        self._lines = self._columns = 0
        """Line ends before the window, and characters before it on its first line."""
        self.at = 0
        """Place in the window."""

    def next(self, past: int = 0) -> str:
        """Go ``past`` characters on, to the next one that is no white space, and return it; none at the end."""
        self.at += past
        while True:
            space = _SPACE.match(self._text, self.at)
            self.at = self.at if space is None else space.end()
            if self.at < len(self._text) or self._is_last:
                return self._text[self.at : self.at + 1]
            self._read_on()

    def value(self, where: str) -> Any:
        """Return the value that begins here, and go behind it; raises BadInput for one that is faulty or too long."""
        before = ""
        while True:
            value, end, why = self._parse()
            if (len(self._text) if why else end) - self.at > LONGEST_ELEMENT:
                what = f"is longer than {LONGEST_ELEMENT:,} characters"
                reject(where, what, "A .json file holds one array, and a record is one of its elements")
            # What is behind the window may go on with its last word, string or number (12 with e+5), and mend a fault.
            is_known = end + (LONGEST_WORD if why else 2) < len(self._text) and (end >= 0 or why == before)
            if self._is_last or (is_known and not why.startswith("Unterminated")):
                break
            before = why
            self._read_on()
        if why:
            self.reject(why, end)
        self.at = end
        return value

    def reject(self, why: str, at: int) -> NoReturn:
        """Raise BadInput for a fault at a place in the window, or somewhere behind its own place for one below 0."""
        line, column = self._position(max(at, self.at))
        reject(f"{self._place}:{line}", f"is not valid JSON: {why}" + (f", column {column}" if at >= 0 else ""))

    def _parse(self) -> tuple[Any, int, str]:
        """Return the value that begins here, the place behind it or of its fault, and the fault in words."""
        try:
            return *_DECODER.raw_decode(self._text, self.at), ""
        except json.JSONDecodeError as error:
            return None, error.pos, error.msg
        except ValueError as error:  # of our own, which know no place
            return None, -1, str(error)
        except RecursionError:
            return None, -1, "nested too deeply"

    def _read_on(self) -> None:
        """Let go of what is behind, and read as much as there still is: no value is parsed often."""
        rest = len(self._text) - self.at
        data = self._file.read(max(PIECE, min(rest, LONGEST_ELEMENT - rest)))
        try:
            piece = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            _reject_bytes(self._place, self._position(len(self._text))[0], error)
        line, column = self._position(self.at)
        self._lines, self._columns = line - 1, column - 1
        self._text, self.at, self._is_last = self._text[self.at :] + piece, 0, not data

    def _position(self, at: int) -> tuple[int, int]:
        """Return line and column of a place in the window, both from 1."""
        lines = self._text.count("\n", 0, at)
        column = at - self._text.rfind("\n", 0, at)
        return 1 + self._lines + lines, column if lines else self._columns + column


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
