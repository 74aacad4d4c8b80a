"""Readers of plugins: files of any format by their ending, and the faults of a reader under its plugin's name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from posttrain.config.schema import Source
from posttrain.data.files import FORMATS, known_endings, read_found
from posttrain.data.mixing import read_sources
from posttrain.data.reading import data_digest
from posttrain.data.unpacking import PACKED
from posttrain.errors import BadInput, PluginFailed
from posttrain.host import plugins, readers
from posttrain.host.guard import Guard
from posttrain.host.plugins import Host
from posttrain.host.readers import OWN_ENDINGS, Reader
from posttrain.host.registration import check_reader

ROW = {"prompt": "a", "completion": "b"}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {suffix: ("", reader) for suffix, reader in readers.known.items()}
    yield
    readers.use(before)


def registered(read: Callable[[BinaryIO], Any], version: str = "1") -> None:
    reader = Reader(name="mine", suffix=".mine", version=version, read=read)
    readers.use({".mine": ("theirs", Guard("theirs", "theirs 1.0").reader(reader))})


def test_the_own_endings_are_those_of_the_table() -> None:
    assert set(OWN_ENDINGS) == {*FORMATS, *PACKED}


def test_ndjson_is_read_with_its_lines(tmp_path: Path) -> None:
    plugins.load()
    path = tmp_path / "rows.ndjson.gz"
    path.write_bytes(gzip.compress(f"{json.dumps(ROW)}\n\n[1]\n{json.dumps(ROW)}\n".encode()))
    found = read_sources([Source(path=str(path), max_bad_share=0.5)], "conversations", seed=0)
    assert [record.where for record in found] == [f"{path}:1", f"{path}:4"]
    assert [bad.where for bad in found.bad[0].rows] == [f"{path}:3"]
    assert ".ndjson" in known_endings()


def test_version_and_name_of_a_reader_are_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "rows.mine"
    path.write_text("x")
    digests = set()
    for version in ("1", "2"):
        registered(lambda file: [(1, ROW)], version)
        digests.add(data_digest([Source(path=str(path))]))
    assert len(digests) == 2


def fails(file: BinaryIO) -> Iterator[Any]:
    yield 1, ROW
    raise KeyError("header")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (fails, "plugin theirs (theirs 1.0) in the reader mine: KeyError: 'header'"),
        (lambda file: [(1, [1, 2])], "in the reader mine: it yielded (1, [1, 2]), not a line's number with its keys"),
        (lambda file: [ROW], "in the reader mine: it yielded {'prompt'"),
        (lambda file: [("1", ROW)], "in the reader mine: it yielded ('1', "),
        (lambda file: None, "in the reader mine: TypeError: 'NoneType' object is not iterable"),
        (lambda file: 1 / 0, "in the reader mine: ZeroDivisionError"),
    ],
)
def test_a_fault_of_a_reader_has_its_plugins_name(tmp_path: Path, read: Any, message: str) -> None:
    (tmp_path / "rows.mine").write_text("x")
    registered(read)
    with pytest.raises(PluginFailed) as failed:
        list(read_found(tmp_path / "rows.mine"))
    assert message in str(failed.value)


def test_a_reader_without_rows_is_a_file_without_records(tmp_path: Path) -> None:
    (tmp_path / "rows.mine").write_text("x")
    registered(lambda file: [])
    with pytest.raises(BadInput, match="holds no records"):
        list(read_found(tmp_path / "rows.mine"))


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        ("csv", "must return Reader objects"),
        (Reader(name="a", suffix="mine", version="1", read=fails), "cannot be the ending of a reader"),
        (Reader(name="a", suffix=".csv", version="1", read=fails), "the ending .csv of reader 'a' is read already"),
        (Reader(name="a", suffix=".mine", version=1, read=fails), "needs a version"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_reader_is_not_registered(reader: Any, message: str) -> None:
    with pytest.raises(PluginFailed) as failed:
        check_reader(Host(manager=None), reader)  # type: ignore[arg-type]
    assert message in str(failed.value)


def test_a_host_reads_the_formats_of_its_own_plugins() -> None:
    registered(fails)
    host = plugins.load([])
    assert list(readers.known) == list(host.readers) == [".ndjson"]
