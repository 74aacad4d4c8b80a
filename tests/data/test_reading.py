"""Reading: files and hub datasets become records, and what cannot be read is named by file and line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from posttrain.config.schema import Format, Source
from posttrain.data.reading import data_digest, read_source
from posttrain.data.records import Conversation, Record
from posttrain.errors import BadInput

PAIR = {"prompt": "Hi", "completion": "Hello"}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path | str, shape: str = "conversations", **options: Any) -> list[Record]:
    return list(read_source(Source(path=str(path), **options), shape))


def rejection(path: Path | str, shape: str = "conversations", **options: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read(path, shape, **options)
    assert len(caught.value.problems) == 1
    return str(caught.value)


# files


def test_jsonl_keeps_line_numbers_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n" + json.dumps(PAIR) + "\r\n  \n" + json.dumps(PAIR))
    assert [record.where for record in read(path)] == [f"{path}:2", f"{path}:4"]


def test_json_and_parquet_keep_the_index(tmp_path: Path) -> None:
    array = write(tmp_path / "a.json", json.dumps([PAIR, PAIR]))
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR]), table)
    for path in (array, table):
        assert [record.where for record in read(path)] == [f"{path}[0]", f"{path}[1]"]


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", json.dumps({**PAIR, "prompt": "second"}))
    write(tmp_path / "a.json", json.dumps([{**PAIR, "prompt": "first"}]))
    write(tmp_path / "notes.txt", "not data")
    assert [r.messages[0]["content"] for r in read(tmp_path) if isinstance(r, Conversation)] == ["first", "second"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    line = json.dumps(PAIR).encode()
    assert len(read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line + b"\n" + line))) == 2
    assert len(read(write(tmp_path / "a.json", b"\xef\xbb\xbf[" + line + b"]"))) == 1


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\x85c", "completion": "ok"}
    (record,) = read(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False)))
    assert isinstance(record, Conversation)
    assert record.messages[0]["content"] == "a\u2028b\x85c"


def test_files_are_not_read_beyond_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(PAIR) + "\n" + json.dumps(PAIR) + "\nbroken")
    assert len(read(path, limit=2)) == 2
    assert f"{path}:3: is not valid JSON" in rejection(path, limit=3)


def test_parquet_nulls_in_messages_count_as_absent(tmp_path: Path) -> None:
    rows = [{"messages": [USER, {**ANSWER, "name": "bot"}], "prompt": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (record,) = read(tmp_path / "a.parquet")
    assert isinstance(record, Conversation)
    assert [dict(message) for message in record.messages] == [USER, {**ANSWER, "name": "bot"}]


GOOD = json.dumps(PAIR).encode()


@pytest.mark.parametrize(
    ("name", "data", "where", "what"),
    [
        ("empty.jsonl", b"", "", "holds no records"),
        ("blank.jsonl", b" \n\n", "", "holds no records"),
        ("empty.json", b"", "", "holds no records"),
        ("none.json", b"[]", "", "holds no records"),
        ("cut.jsonl", GOOD + b"\n" + GOOD[:-4], ":2", "is not valid JSON: Unterminated string"),
        ("comma.jsonl", b'{"prompt": "a",}', ":1", "is not valid JSON"),
        ("comma.json", b"[\n" + GOOD + b",\n]", ":3", "is not valid JSON"),
        ("array.jsonl", b"[\n" + GOOD + b"\n]", ":1", "an array belongs in a .json file"),
        ("rows.jsonl", b"[1]", ":1", "a record must be an object, not an array"),
        ("number.json", b"[1]", "[0]", "a record must be an object, not a number"),
        ("null.jsonl", GOOD + b"\nnull", ":2", "a record must be an object, not null"),
        ("object.json", b'{"data": []}', "", "holds an object, not an array"),
        ("lines.json", GOOD + b"\n" + GOOD, ":2", "is not valid JSON: Extra data"),
        ("nan.jsonl", b'{"prompt": NaN}', ":1", "NaN is not a JSON value"),
        ("infinity.json", b'[{"prompt": -Infinity}]', ":1", "-Infinity is not a JSON value"),
        ("twice.jsonl", b'{"prompt": "a", "prompt": "b"}', ":1", "the key 'prompt' occurs twice"),
        ("latin.jsonl", GOOD + b'\n{"prompt": "\xe9"}', ":2", "is not UTF-8: byte 0xe9"),
        ("latin.json", b'[\n\n"\xe9"]', ":3", "is not UTF-8: byte 0xe9"),
        ("wide.jsonl", GOOD.decode().encode("utf-16"), ":1", "is not UTF-8: byte 0xff"),
        ("middle.jsonl", GOOD + b"\n\xef\xbb\xbf" + GOOD, ":2", "is not valid JSON"),
        ("nul.jsonl", b'{"prompt": "\0"}', ":1", "is not valid JSON"),
        ("deep.jsonl", b"[" * 200_000, ":1", "nested too deeply"),
        ("digits.jsonl", b'{"prompt": 1' + b"0" * 5000 + b"}", ":1", "is not valid JSON"),
        ("half.jsonl", b'{"prompt": "\\ud800", "completion": "b"}', ":1", "half of a surrogate pair"),
        ("bad.parquet", b"PAR1 but not really", "", "is not a sound Parquet file"),
        ("bad.xml", b"<a>", "", "unknown ending"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, data: bytes, where: str, what: str) -> None:
    path = write(tmp_path / name, data)
    message = rejection(path)
    assert message.startswith(f"{path}{where}: ")
    assert what in message


@given(st.binary(max_size=60), st.sampled_from([".json", ".jsonl", ".parquet"]))
def test_any_bytes_are_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, data: bytes, ending: str) -> None:
    path = write(tmp_path_factory.getbasetemp() / f"bytes{ending}", data)
    assert str(path) in rejection(path)


def test_special_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is not a regular file" in rejection(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "is a broken link" in rejection(tmp_path / "loop.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no file of .json, .jsonl, .parquet" in rejection(tmp_path / "empty")


def test_absent_files_name_their_nearest_sibling(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    assert f"Did you mean {tmp_path / 'train.jsonl'}?" in rejection(tmp_path / "trian.jsonl")
    assert "does not exist either" in rejection(tmp_path / "nowhere" / "train.jsonl")
    for name in ("./train", "~/no-such-data", "one/two/three", "train.parquet"):
        assert f"{name}: no such file or directory" in rejection(name)


def test_a_name_without_its_ending_is_no_hub_name_and_names_the_file(working_folder: Path) -> None:
    Path("data").mkdir()
    for folder in ("", "data/"):
        write(Path(f"{folder}chats.jsonl"), GOOD)
        for name in (f"{folder}chat", f"{folder}chats", f"{folder}chats.json"):
            assert f"{name}: no such file or directory" in rejection(name)
            assert f"Did you mean {folder}chats.jsonl?" in rejection(name)
    assert "Give a file of the folder data" in rejection("data/other")


# hub


def test_a_hub_name_is_streamed_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        calls.append((path, options))
        return [PAIR, PAIR]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    records = read("owner/name", split="test", subset="main", revision="abc")
    assert [record.where for record in records] == ["owner/name[0]", "owner/name[1]"]
    assert calls == [("owner/name", {"name": "main", "split": "test", "revision": "abc", "streaming": True})]


@pytest.mark.parametrize("error", [ConnectionError("no route"), FileNotFoundError("no route"), ValueError("no route")])
def test_hub_failures_are_bad_input(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = rejection("owner/name")
    assert message.startswith(
        "owner/name: no such file or directory, and the hub dataset (split 'train') cannot be read"
    )
    assert "no route" in message


def test_what_is_neither_path_nor_hub_name_is_rejected() -> None:
    assert "A hub dataset is named owner/name" in rejection("alpaca")


def test_a_mixed_file_is_fine(tmp_path: Path) -> None:
    rows = [PAIR, {"messages": [USER, ANSWER]}, {"instruction": "Hi", "output": "Hello"}]
    records = read(write(tmp_path / "a.json", json.dumps(rows)))
    assert [[m["content"] for m in r.messages] for r in records if isinstance(r, Conversation)] == [["Hi", "Hello"]] * 3


# columns


def test_a_group_is_kept_only_where_columns_name_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "a", "completion": "b", "group": "x", "topic": topic} for topic in ("sea", 7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(each.group, each.unread) for each in read(path)] == [("", ("group", "topic"))] * 2
    assert [(each.group, each.unread) for each in read(path, columns={"group": "topic"})] == [("sea", ()), ("7", ())]
    path.write_text(json.dumps(rows[0] | {"topic": ["sea"]}))
    assert "the group is" in rejection(path, columns={"group": "topic"})


def test_columns_rename_before_the_shape_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"question": "1+1?", "answer": "2"}))
    (record,) = read(path, columns={"prompt": "question", "completion": "answer"})
    assert isinstance(record, Conversation)
    assert [message["content"] for message in record.messages] == ["1+1?", "2"]
    message = rejection(path, columns={"prompt": "questoin", "completion": "answer"})
    assert f"{path}:1: columns names 'questoin'" in message
    assert "Did you mean question?" in message


def test_columns_can_swap(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "a", "completion": "b"}))
    (record,) = read(path, columns={"prompt": "completion", "completion": "prompt"})
    assert isinstance(record, Conversation)
    assert [message["content"] for message in record.messages] == ["b", "a"]


# digest


def test_the_digest_follows_content_and_options_but_not_paths(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", GOOD)
    (tmp_path / "moved").mkdir()
    two = Path(shutil.copy(one, tmp_path / "moved" / "two.jsonl"))
    base = data_digest([Source(path=str(one))])
    assert base == data_digest([Source(path=str(two))])
    changes: list[dict[str, Any]] = [
        {"format": Format.alpaca}, {"columns": {"prompt": "q"}}, {"limit": 1}, {"weight": 2.0}, {"split": "test"},
        {"subset": "main"}, {"revision": "abc"}, {"share": 0.2},
    ]  # fmt: skip
    digests = {data_digest([Source(path=str(one), **change)]) for change in changes}
    assert len(digests | {base}) == len(changes) + 1
    write(one, GOOD + b"\n")
    assert data_digest([Source(path=str(one))]) != base


def test_the_digest_of_several_files_and_of_hub_names(tmp_path: Path) -> None:
    for folder, names in (("x", ("a", "b")), ("y", ("c", "d"))):
        (tmp_path / folder).mkdir()
        for name, data in zip(names, ("1", "2"), strict=True):
            write(tmp_path / folder / f"{name}.jsonl", data)
    x, y = (Source(path=str(tmp_path / folder)) for folder in "xy")
    assert data_digest([x]) == data_digest([y])
    assert data_digest([x]) != data_digest([x, y])
    hub = [Source(path="owner/name"), Source(path="owner/other"), Source(path="owner/name", revision="abc")]
    assert len({data_digest([source]) for source in hub}) == 3
