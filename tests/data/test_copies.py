"""Copies of hub datasets and of files at URLs: resumed where they were interrupted, and enough without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from posttrain.config.schema import Source
from posttrain.data import hub, urls
from posttrain.data.plugin import _check_source
from posttrain.data.reading import data_digest, read_source
from posttrain.errors import BadInput

ROWS = [{"prompt": f"Question {number}?", "completion": f"Answer {number}."} for number in range(25)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def prompts(source: Source, cache: Path) -> list[str]:
    read = read_source(source, "conversations", cache)
    return [record.messages[0]["content"] for record in read]  # type: ignore[union-attr]


def rejection(source: Source, cache: Path) -> str:
    with pytest.raises(BadInput) as caught:
        prompts(source, cache)
    return str(caught.value)


# --- Hub --------------------------------------------------------------------------------------------------------------


class Hub:
    """A hub whose connection breaks before row ``breaks_at``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.breaks_at, self.asked = folder, 10**9, 0
        self.first: list[int] = []

    def load_dataset(self, path: str, **options: Any) -> Any:
        from datasets import load_dataset

        self.asked += 1
        assert path == "owner/name"
        if self.breaks_at == 0:
            raise ConnectionError("no route")
        dataset = load_dataset("json", data_files=[str(file) for file in sorted(self.folder.iterdir())], split="train",
                               streaming=options["streaming"])  # fmt: skip
        return dataset.map(self._give)

    def _give(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["prompt"].split()[1].rstrip("?"))
        if number >= self.breaks_at:
            raise ConnectionError("connection lost")
        self.first.append(number)
        return row


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import datasets

    original = datasets.load_dataset
    (tmp_path / "server").mkdir()
    for part in range(5):
        chunk = "".join(json.dumps(row) + "\n" for row in ROWS[5 * part : 5 * part + 5])
        (tmp_path / "server" / f"part-{part}.jsonl").write_text(chunk)
    found = Hub(tmp_path / "server")

    def load_dataset(path: str, **options: Any) -> Any:
        return original(path, **options) if path == "json" else found.load_dataset(path, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "ROWS_KEPT", 10)
    return found


def test_a_dataset_is_copied_once_and_read_without_a_network(stand_in: Hub, tmp_path: Path) -> None:
    source = Source(path="owner/name", revision="abc")
    first = data_digest([source], tmp_path)
    assert prompts(source, tmp_path) == [row["prompt"] for row in ROWS]
    stand_in.breaks_at = 0
    assert prompts(source, tmp_path) == [row["prompt"] for row in ROWS]
    assert [r.where for r in read_source(source, "conversations", tmp_path)][-1] == "owner/name[24]"
    assert data_digest([source], tmp_path) == first
    assert stand_in.asked == 1
    assert "no route" in rejection(Source(path="owner/name", revision="def"), tmp_path)


def test_a_broken_copy_goes_on_where_it_was(stand_in: Hub, tmp_path: Path) -> None:
    source = Source(path="owner/name")
    stand_in.breaks_at = 13
    message = rejection(source, tmp_path)
    assert "connection lost" in message
    assert "10 rows of it are kept" in message
    (copy,) = tmp_path.glob("hub/owner--name-*/rows.jsonl")
    copy.write_bytes(copy.read_bytes() + b'{"half')
    stand_in.breaks_at, stand_in.first = 10**9, []
    assert prompts(source, tmp_path) == [row["prompt"] for row in ROWS]
    assert stand_in.first[0] == 10


def test_no_more_than_the_limit_is_copied(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.breaks_at = 8
    assert len(prompts(Source(path="owner/name", limit=7), tmp_path)) == 7


@pytest.mark.parametrize("spoil", [b"", b"[]", b'{"rows": 25'])
def test_a_damaged_copy_is_made_again(stand_in: Hub, tmp_path: Path, spoil: bytes) -> None:
    source = Source(path="owner/name")
    prompts(source, tmp_path)
    (copy,) = tmp_path.glob("hub/owner--name-*/rows.jsonl")
    (copy.with_name("state.json") if spoil else copy).write_bytes(spoil)
    assert len(prompts(source, tmp_path)) == 25
    assert stand_in.asked == 2


def test_what_json_cannot_hold_is_named_by_its_type() -> None:
    import datetime

    row = {"a": b"bytes", "b": datetime.datetime(2026, 1, 31), "c": "half \ud800"}
    assert json.loads(hub._line(row)) == {"a": "<bytes>", "b": "2026-01-31T00:00:00", "c": "half \ud800"}


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_a_file_at_a_url_is_copied_and_read(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/data/train.jsonl", LINES.encode())
    source = Source(path="memory://data/train.jsonl")
    assert prompts(source, tmp_path) == [row["prompt"] for row in ROWS]
    assert [r.where for r in read_source(source, "conversations", tmp_path)][1] == "memory:///data/train.jsonl:2"
    assert [problem.what for problem in _check_source(source, "sft.data")] == []
    (tmp_path / "train.jsonl").write_text(LINES)
    assert data_digest([source], tmp_path) == data_digest([Source(path=str(tmp_path / "train.jsonl"))])


def test_a_changed_file_is_copied_again_and_the_copy_serves_without_a_network(memory: Any, tmp_path: Path) -> None:
    source = Source(path="memory://data/train.jsonl")
    memory.pipe("/data/train.jsonl", LINES.encode())
    first = data_digest([source], tmp_path)
    memory.pipe("/data/train.jsonl", LINES.encode()[: len(LINES) // 5 * 3 // 53 * 53].rsplit(b"\n", 1)[0] + b"\n")
    assert 0 < len(prompts(source, tmp_path)) < 25
    assert data_digest([source], tmp_path) != first
    memory.rm("/data/train.jsonl")
    assert 0 < len(prompts(source, tmp_path)) < 25
    assert "memory://data/other.jsonl: cannot be read" in rejection(Source(path="memory://data/other.jsonl"), tmp_path)


def test_a_copy_goes_on_behind_its_part(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/data/train.jsonl", LINES.encode())
    source = Source(path="memory://data/train.jsonl")
    monkeypatch.setattr(urls, "BLOCK", 100)
    original, read = memory._open, []

    def breaking(path: str, *args: Any, **options: Any) -> Any:
        file = original(path, *args, **options)
        give = file.read

        def once(size: int) -> bytes:
            read.append(file.tell())
            if len(read) == 3:
                raise ConnectionError("connection lost")
            return bytes(give(size))

        file.read = once
        return file

    monkeypatch.setattr(type(memory), "_open", staticmethod(breaking))
    assert "connection lost" in rejection(source, tmp_path)
    assert prompts(source, tmp_path) == [row["prompt"] for row in ROWS]
    assert read[:4] == [0, 100, 200, 200]


def test_folders_and_patterns_at_a_url(memory: Any, tmp_path: Path) -> None:
    for name in ("b/two", "a/one", "a/three"):
        memory.pipe(f"/data/{name}.jsonl", json.dumps({"prompt": name, "completion": "x"}).encode())
    memory.pipe("/data/a/notes.md", b"x")
    assert prompts(Source(path="memory://data/**/*.jsonl"), tmp_path) == ["a/one", "a/three", "b/two"]
    assert prompts(Source(path="memory://data/a"), tmp_path) == ["a/one", "a/three"]
    assert "there is no file of .json" in rejection(Source(path="memory://data/*.csv"), tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/train.jsonl", "no files are read by s4://\n    Available: abfs"),
        ("file:///etc/passwd.txt", "no files are read by file://"),
        ("simplecache::https://x/a.jsonl", "no files are read by"),
        ("https://user:hunter2@x/a.jsonl", "https://x/a.jsonl: holds a password"),
        ("https://x/a.xml", "https://x/a.xml: unknown ending"),
        ("s3://bucket/train.jsonl", "its library is not installed: Install s3fs"),
    ],
)
def test_a_url_that_nothing_can_read_is_named_by_the_plan(url: str, message: str) -> None:
    (problem,) = _check_source(Source(path=url), "sft.data")
    assert message in str(problem)
    assert "hunter2" not in str(problem)


def test_a_url_is_no_file_of_a_gate() -> None:
    with pytest.raises(BadInput, match="only the data of a stage"):
        list(read_source(Source(path="memory://data/train.jsonl"), "conversations"))
