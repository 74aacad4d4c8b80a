"""Kinds of files: tables of cells, compressed files, folders and patterns, and bombs in any of them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from posttrain.config.schema import Source
from posttrain.data import tables, unpacking
from posttrain.data.reading import count_selected, read_source
from posttrain.data.records import Conversation, Feedback, Preference, Record
from posttrain.errors import BadInput

PAIR = {"prompt": "Hi", "completion": "Hello"}
LINE = json.dumps(PAIR).encode() + b"\n"


def packed(path: Path, data: bytes) -> Path:
    path.write_bytes(pyarrow.compress(data, codec=unpacking.PACKED[path.suffix], asbytes=True))
    return path


def write(path: Path, data: str) -> Path:
    path.write_text(data, newline="")
    return path


def read(path: Path | str, shape: str = "conversations", **options: Any) -> list[Record]:
    return list(read_source(Source(path=str(path), **options), shape))


def said(records: list[Record]) -> list[list[str]]:
    return [[m["content"] for m in record.messages] for record in records if isinstance(record, Conversation)]


def rejection(path: Path | str, shape: str = "conversations", **options: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read(path, shape, **options)
    return str(caught.value)


# cells


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_cells_are_read_under_the_names_of_the_first_line(tmp_path: Path, ending: str, separator: str) -> None:
    rows = [['Say "a,b"\tand\nc', "Ä"], ["Hi", "Hello"], ["", ""]]
    with (tmp_path / f"a{ending}").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows([["prompt", "completion"], *rows])
    records = read(tmp_path / f"a{ending}")
    assert said(records) == rows[:2]
    assert [record.where.rpartition(":")[2] for record in records] == ["2", "4"]


def test_cells_hold_marks_and_messages_as_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "weight", "system"], [json.dumps(chat), "1.0", ""]])
    assert said(read(tmp_path / "a.csv")) == [["Hi", "Hello"]]
    judged = write(tmp_path / "b.csv", "prompt,completion,label\na,b,True\na,c,false\n")
    assert [r.label for r in read(judged, "feedback") if isinstance(r, Feedback)] == [True, False]
    assert "b.csv:3: label is false: the answer was judged bad" in rejection(judged)
    pair = write(tmp_path / "c.tsv", "prompt\tchosen\trejected\na\t[1, 2]\tnull\n")
    (record,) = read(pair, "preferences")
    assert isinstance(record, Preference)
    assert [record.chosen[0]["content"], record.rejected[0]["content"]] == ["[1, 2]", "null"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("prompt,completion\na,b\na\n", "a.csv:3: has 1 cells, but the first line names 2 columns"),
        ("prompt,completion\na,b,c\n", "a.csv:2: has 3 cells"),
        ('prompt,completion\na,"b\n\n', "a.csv:2: a quotation mark opens a cell here and is never closed"),
        ('prompt,completion\na,"b"c\n', "a.csv:2: cannot be split into cells"),
        ("prompt,prompt\na,b\n", "a.csv:1: two columns have the name 'prompt'"),
        ("prompt,\na,b\n", "a.csv:1: a column has no name"),
        ("prompt;completion\na;b\n", "a.csv:1: names one column, 'prompt;completion': the cells seem to be separated"),
        ("prompt\tcompletion\na\tb\n", "Name the file .tsv"),
        ("prompt,completion\n", "a.csv: holds no records"),
        ("", "a.csv: holds no records"),
        ("prompt,completion\n\n,\n", "a.csv: holds no records"),
    ],
)
def test_cells_that_cannot_be_read_are_named(tmp_path: Path, data: str, message: str) -> None:
    assert message in rejection(write(tmp_path / "a.csv", data))


def test_cells_that_are_no_text_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\na,b\n\xe9,b\n")
    assert "a.csv:3: is not UTF-8: byte 0xe9" in rejection(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfep\x00")
    assert "b.csv:1: is not UTF-8" in rejection(tmp_path / "b.csv")


def test_a_million_characters_are_a_cell_and_a_line(tmp_path: Path) -> None:
    long = "word " * 200_000
    assert said(read(write(tmp_path / "a.csv", f"prompt,completion\nHi,{long}\n"))) == [["Hi", long]]
    lines = write(tmp_path / "a.jsonl", json.dumps({**PAIR, "completion": long}))
    assert said(read(lines)) == [["Hi", long]]


# compressed


@pytest.mark.parametrize("ending", unpacking.PACKED)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINE * 3),
        ("a.json", b"[" + b",".join([LINE] * 3) + b"]"),
        ("a.csv", b"prompt,completion\n" + b"Hi,Hello\n" * 3),
        ("a.tsv", b"prompt\tcompletion\n" + b"Hi\tHello\n" * 3),
    ],
)
def test_a_text_is_read_compressed(tmp_path: Path, ending: str, name: str, data: bytes) -> None:
    path = packed(tmp_path / f"{name}{ending}", data)
    records = read(path)
    assert said(records) == [["Hi", "Hello"]] * 3
    assert all(record.where.startswith(str(path)) for record in records)
    assert count_selected(Source(path=str(path))) is None


def test_parts_packed_one_behind_the_other_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE) + gzip.compress(LINE))
    assert len(read(tmp_path / "a.jsonl.gz")) == 2


@pytest.mark.parametrize("ending", unpacking.PACKED)
def test_a_damaged_or_cut_file_is_rejected(tmp_path: Path, ending: str) -> None:
    path = packed(tmp_path / f"a.jsonl{ending}", LINE * 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert f"{path}: is damaged or cut: Truncated" in rejection(path)
    path.write_bytes(LINE)
    assert f"{path}: is damaged or cut" in rejection(path)
    path.write_bytes(b"")
    assert f"{path}: holds no records" in rejection(path)


def test_a_table_of_columns_is_not_read_compressed(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.parquet.gz", b"PAR1")
    assert f"{path}: unknown ending" in rejection(path)


# bombs


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "ALWAYS_UNPACKED", 2**20)


@pytest.mark.usefixtures("small_bounds")
@pytest.mark.parametrize("ending", unpacking.PACKED)
@pytest.mark.parametrize("filling", [b"\0", b"\n"])
def test_a_file_that_unpacks_without_bound_is_rejected(tmp_path: Path, ending: str, filling: bytes) -> None:
    path = packed(tmp_path / f"a.jsonl{ending}", LINE + filling * 2**24)
    assert "unpacks to more than" in rejection(path)


@pytest.mark.usefixtures("small_bounds")
@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["x" * 2**23]),
        pyarrow.array(["x" * 2**15] * 200),
        pyarrow.array([True] * 10**6),
        pyarrow.array([[0] * 10**6]),
        pyarrow.array(["x" * 2**15] * 200).dictionary_encode(),
    ],
    ids=["long", "repeated", "many", "deep", "numbered"],
)
def test_a_table_that_unpacks_without_bound_is_rejected(tmp_path: Path, column: pyarrow.Array) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": column}), path, compression="zstd", write_statistics=False)
    assert path.stat().st_size < 2**12
    assert f"{path}: unpacks to more than 1,048,576 bytes" in rejection(path)


def test_a_table_of_one_repeated_row_is_no_bomb(tmp_path: Path) -> None:
    row = {"prompt": "Which flag flies over Norden? " * 30, "completion": "The brown one. " * 30}
    parquet.write_table(pyarrow.Table.from_pylist([row] * 3 * tables.ROWS_AT_ONCE), tmp_path / "a.parquet")
    assert len(read(tmp_path / "a.parquet")) == 3 * tables.ROWS_AT_ONCE


# folders and patterns


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/two.jsonl", "a/deep/one.jsonl", "a/notes.md", "a/.hidden.jsonl", "three.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**PAIR, "prompt": path.stem}))
    packed(tmp_path / "b" / "zip.jsonl.gz", json.dumps({**PAIR, "prompt": "zip"}).encode())
    (tmp_path / "a" / "deep" / "up").symlink_to(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "prompts"),
    [
        ("*.jsonl", ["three"]),
        ("b/*", ["two", "zip"]),
        ("**/*.jsonl", ["one", "two", "three"]),
        ("**/*.jsonl*", ["one", "two", "zip", "three"]),
        ("?/*.jsonl", ["two"]),
        ("[ab]/**/[ot]*", ["one", "two"]),
    ],
)
def test_a_pattern_names_files_in_the_order_of_their_paths(tree: Path, pattern: str, prompts: list[str]) -> None:
    assert [first for first, _ in said(read(tree / pattern))] == prompts


def test_a_pattern_without_a_file_is_rejected(tree: Path) -> None:
    assert "a/*.md: no file of .json, .jsonl" in rejection(tree / "a" / "*.md")
    assert f"there is no directory {tree / 'c'}" in rejection(tree / "c" / "*.jsonl")


def test_a_name_with_the_characters_of_a_pattern_is_a_name(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "a[1].jsonl", json.dumps(PAIR)))) == 1


def test_a_folder_holds_compressed_files_and_tables(tmp_path: Path) -> None:
    packed(tmp_path / "a.jsonl.zst", LINE)
    write(tmp_path / "b.csv", "prompt,completion\nHi,Hello\n")
    packed(tmp_path / "c.txt.gz", b"a note")
    assert said(read(tmp_path)) == [["Hi", "Hello"]] * 2


# parts of content


def test_parts_of_text_are_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you", "image_url": None}]
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts}]}]
    lines = write(tmp_path / "a.jsonl", json.dumps(rows[0]))
    parquet.write_table(
        pyarrow.table({"prompt": ["Hi"], "completion": [[{"type": "text", "text": "Hello you"}]]}),
        tmp_path / "b.parquet",
    )
    assert said(read(lines)) == said(read(tmp_path / "b.parquet")) == [["Hi", "Hello you"]]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "part 2 of content is of type 'image_url', but only text"),
        ({"type": "text", "text": "a", "image": "x"}, "part 2 of content has image, but only text is trained"),
        ({"type": "text"}, "part 2 of content: text must be a string, not null"),
        ({"type": "text", "text": "a", "weight": 0.5}, "part 2 of content has weight, which nothing reads"),
        ({"type": ["text"], "text": "a"}, "part 2 of content is of type ['text']"),
    ],
)
def test_other_parts_are_rejected(tmp_path: Path, part: dict[str, Any], message: str) -> None:
    content = [{"type": "text", "text": "a"}, part]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}
    assert f"a.jsonl:1: turn 1 of messages (user): {message}" in rejection(write(tmp_path / "a.jsonl", json.dumps(row)))


# columns


def test_columns_take_values_from_within(tmp_path: Path) -> None:
    row = {"q": {"text": "Hi"}, "answers": [{"text": "no"}, {"text": "Hello"}], "a.b": "kept"}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    (record,) = read(path, columns={"prompt": "q.text", "completion": "answers.1.text", "system": "a.b"})
    assert said([record]) == [["kept", "Hi", "Hello"]]
    assert record.unread == ()
    absent = rejection(path, columns={"prompt": "q.text", "completion": "answers.2.text"})
    assert "columns names 'answers.2.text'" in absent
