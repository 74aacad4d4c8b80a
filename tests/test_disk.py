"""Errors of the disk: under the right name, with the documented exit code, for every way to write."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.disk import (
    DISK_ERRORS,
    PLACE_ERRORS,
    append_synced,
    explain_error,
    replace_text,
    require_writable,
    sync,
    write_synced,
)
from posttrain.errors import BadInput, DiskFailed

WRITES: list[Callable[[Path], None]] = [
    lambda path: write_synced(path, "text"),
    lambda path: append_synced(path, b"line\n"),
    lambda path: replace_text(path, "text"),
    sync,
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("number", [*DISK_ERRORS, *PLACE_ERRORS])
def test_every_write_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], number: int
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))  # no file: it knows its descriptor only

    file = tmp_path / "file.json"
    file.write_text("")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"file\.json") as raised:
        write(file)
    known = explain_error(raised.value)
    assert isinstance(known, DiskFailed if number in DISK_ERRORS else BadInput)
    assert "file.json" in str(known)


def test_the_last_byte_of_a_disk_that_takes_half_a_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        append_synced(Path("/dev/full"), b"line\n")
    assert "/dev/full" in str(explain_error(raised.value))


def test_other_errors_are_bugs() -> None:
    assert explain_error(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None


@pytest.mark.parametrize("name", ["taken", "taken/below", "/proc/none", "/dev/null/x", "n" * 300])
def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    with pytest.raises(BadInput, match=name.split("/")[-1]):
        require_writable(Path(name))


def test_a_writable_folder_is_left_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("root", ["taken", "taken/below", "/dev/null/x"])
@pytest.mark.parametrize(
    "words",
    [
        ["recipe=quickstart"],
        ["leaderboard"],
        ["ledger", "export"],
        ["ledger", "verify"],
        ["ledger", "rebuild"],
    ],
)
def test_an_output_root_that_is_a_file_is_bad_input_to_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], root: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, f"output_root={root}"])
    assert ended.value.code == 2
    assert f"error: {root}" in capsys.readouterr().err
