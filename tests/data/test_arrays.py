"""Arrays of JSON: read piece by piece, with the elements, the places and the faults of a parser that reads it whole."""

from __future__ import annotations

import gzip
import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import texts
from posttrain.data.files import read_found
from posttrain.data.rows import BadRow
from posttrain.errors import BadInput

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
SPACES = st.text(" \t\r\n", max_size=3)
PIECES = st.integers(1, 9)


def read(data: bytes, piece: int, place: str = "a.json") -> list[Any]:
    """Return the elements of an array of which ``piece`` bytes are read at once; bad rows as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", piece)
        return list(texts.read_json(io.BytesIO(data), place))


def fault(data: bytes, piece: int) -> str:
    with pytest.raises(BadInput) as caught:
        read(data, piece)
    return str(caught.value)


def whole(text: str) -> tuple[Any, str]:
    """Return what Python's own parser reads, and the message for what it does not, or what is said in it."""
    try:
        return json.loads(text, parse_float=finite, object_pairs_hook=unique), ""
    except json.JSONDecodeError as error:
        # a newer Python has a sentence of its own for it, and points at the comma
        why = "Expecting value" if error.msg.startswith("Illegal trailing comma") else error.msg
        return None, f"a.json:{error.lineno}: is not valid JSON: {why}, column {error.colno}"
    except ValueError as error:
        return None, str(error)


def finite(digits: str) -> float:
    if math.isinf(float(digits)):
        raise ValueError(f"the number {digits[:20]} is too large")
    return float(digits)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("occurs twice in an object")
    return dict(pairs)


@given(st.lists(st.dictionaries(st.text(), VALUES) | VALUES), SPACES, PIECES, st.booleans(), st.sampled_from([None, 1]))
def test_an_array_has_the_elements_of_one_read_whole(
    elements: list[Any], space: str, piece: int, escaped: bool, indent: int | None
) -> None:
    text = space + json.dumps(elements, ensure_ascii=escaped, indent=indent) + space
    found, expected = read(_utf8(text), piece), json.loads(_utf8(text))
    assert len(found) == len(expected)
    for index, (row, element) in enumerate(zip(found, expected, strict=True)):
        if isinstance(element, dict):
            assert row == (f"a.json[{index}]", element)
        else:
            assert isinstance(row, BadRow)
            assert (row.where, row.kind) == (f"a.json[{index}]", "shape")


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")


@given(st.lists(VALUES, min_size=1), SPACES, PIECES, st.data())
def test_a_spoilt_array_is_rejected_at_the_place_where_one_read_whole_is(
    elements: list[Any], space: str, piece: int, data: st.DataObject
) -> None:
    text = _utf8(space + json.dumps(elements, indent=data.draw(st.sampled_from([None, 1]))) + space).decode()
    at = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.sampled_from(["", ",", "]", "[", "{", "}", '"', ":", "x", "1", "-", "e", "\\", "\n", "\x00"]))
    spoilt = text[:at] + put + text[at + data.draw(st.integers(0, 2)) :]
    values, message = whole(spoilt)
    if not spoilt.strip():
        assert read(spoilt.encode(), piece) == []
    elif message:
        assert fault(spoilt.encode(), piece).splitlines()[0].endswith(message)
    elif isinstance(values, list):
        assert len(read(spoilt.encode(), piece)) == len(values)
    else:
        assert ", not an array" in fault(spoilt.encode(), piece)


FAULTS = {
    "cut in a string": (b'[1,\n {"a": "b', "a.json:2: is not valid JSON: Unterminated string starting at, column 8"),
    "cut behind an element": (b'[{"a": "b"}', "a.json:1: is not valid JSON: Expecting ',' delimiter, column 12"),
    "cut behind a comma": (b'[{"a": "b"},\n', "a.json:2: is not valid JSON: Expecting value, column 1"),
    "nothing but its beginning": (b"[", "a.json:1: is not valid JSON: Expecting value, column 2"),
    "a comma at the end": (b'[{"a": 1},\n]', "a.json:2: is not valid JSON: Expecting value, column 1"),
    "a second text": (b'[{"a": 1}]\n[1]', "a.json:2: is not valid JSON: Extra data, column 1"),
    "lines of objects": (b'{"a": 1}\n{"a": 2}', "a.json:2: is not valid JSON: Extra data, column 1"),
    "an object": (b'{"data": []}', "a.json: holds an object, not an array"),
    "a number": (b"12e+3 ", "a.json: holds a number, not an array"),
    "doubled keys": (b'[{"a": 1},\n{"b": 1, "b": 2}]', "a.json:2: is not valid JSON: the key 'b' occurs twice"),
    "NaN": (b'[{"a": 1},\n\n{"b": NaN}]', "a.json:3: is not valid JSON: NaN is not a JSON value"),
    "too large": (b'[{"b": 1e400}]', "a.json:1: is not valid JSON: the number 1e400 is too large"),
    "too large before a fault": (b'[{"b": 1e400.0}]', "a.json:1: is not valid JSON: the number 1e400 is too large"),
    "too many digits": (b'[{"b": 1' + b"0" * 5000 + b"}]", "a.json:1: is not valid JSON: Exceeds the limit"),
    "nested": (b'[1,\n' + b"[" * 10**4, "a.json:2: is not valid JSON: nested too deeply"),
    "nested objects": (b'{"a":' * 10**4, "a.json:1: is not valid JSON: nested too deeply"),
    "no UTF-8": (b'[{"a": 1},\n{"b": "caf\xe9"}]', "a.json:2: is not UTF-8: byte 0xe9"),
    "UTF-8 cut in a character": (b'[{"a":\n "caf\xc3', "a.json:2: is not UTF-8: byte 0xc3"),
    "UTF-16": ('[{"a": 1}]'.encode("utf-16"), "a.json:1: is not UTF-8: byte 0xff"),
    "a control character": (b'[{"a": "\x00"}]', "a.json:1: is not valid JSON: Invalid control character at, column 9"),
}  # fmt: skip


@pytest.mark.parametrize("piece", [1, 7, texts.PIECE])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_by_their_line_whatever_is_read_at_once(name: str, piece: int) -> None:
    data, message = FAULTS[name]
    assert fault(data, piece).startswith(message)
    if data.startswith(b"["):  # a byte order mark moves nothing
        assert fault(b"\xef\xbb\xbf" + data, piece).startswith(message)


def test_the_elements_before_a_fault_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1}, 2, {"a": 3},')
    rows = read_found(path)
    found = [next(rows) for _ in range(3)]
    assert [each.where if isinstance(each, BadRow) else each[0] for each in found] == [f"{path}[{i}]" for i in range(3)]
    with pytest.raises(BadInput, match=r"a\.json:1: is not valid JSON: Expecting value"):
        next(rows)


def test_an_element_without_end_is_rejected_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_ELEMENT", 2**16)
    monkeypatch.setattr(texts, "PIECE", 2**10)
    with gzip.open(tmp_path / "a.json.gz", "wb") as file:
        file.write(b'[{"a": 1}, {"b": "' + b"x" * 10**7)
    with pytest.raises(BadInput, match=r"a\.json\.gz\[1\]: is longer than 65,536 characters"):
        list(read_found(tmp_path / "a.json.gz"))
    text = '[{"a": "' + "x" * 2**16 + '"}, 1]'
    assert fault(text.encode(), 2**10).startswith("a.json[0]: is longer than 65,536 characters")
    fits = '[{"a": "' + "x" * (2**16 - 10) + '"}, {"b": 1}, x]'
    assert fault(fits.encode(), 2**10).startswith("a.json:1: is not valid JSON: Expecting value")


def test_memory_does_not_grow_with_an_array(tmp_path: Path) -> None:
    def peak(records: int) -> int:
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"prompt": "x" * 500, "n": number} for number in range(records)]))
        tracemalloc.start()
        assert sum(1 for _ in read_found(path)) == records
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return largest

    assert peak(20_000) < 1.2 * peak(2_000)
