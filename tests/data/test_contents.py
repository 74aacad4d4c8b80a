"""Remembered digests: a file unchanged by all figures is not read again, and nothing stale or damaged is trusted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.config.schema import Source
from posttrain.data import contents
from posttrain.data.contents import Contents
from posttrain.data.reading import data_digest
from posttrain.digests import file_digest


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files hashed so far."""
    found: list[Path] = []

    def noted(path: Path) -> str:
        found.append(path)
        return file_digest(path)

    monkeypatch.setattr(contents, "file_digest", noted)
    return found


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock an hour ahead of the files'."""
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 3_600 * 10**9)


def digest(path: Path, kept: Path) -> str:
    """Return the digest as a new start would."""
    known = Contents(kept)
    found = known.digest(path)
    known.save()
    return found


@pytest.mark.usefixtures("later")
def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[Path]) -> None:
    path, kept = tmp_path / "a.jsonl", tmp_path / "cache" / "digests.json"
    path.write_text("one")
    assert digest(path, kept) == digest(path, kept) == file_digest(path)
    assert hashed == [path]
    assert data_digest([Source(path=str(path))], tmp_path / "cache") == data_digest([Source(path=str(path))])
    assert hashed == [path, path]  # once more, by the call without a cache


@pytest.mark.usefixtures("later")
def test_a_file_of_the_same_size_and_time_is_hashed_again(tmp_path: Path, hashed: list[Path]) -> None:
    path, kept = tmp_path / "a.jsonl", tmp_path / "digests.json"
    path.write_text("one")
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    first = digest(path, kept)
    path.write_text("two")
    os.utime(path, ns=times)  # as cp -p and tar set it
    assert digest(path, kept) == file_digest(path) != first
    other = tmp_path / "b"
    other.write_text("six")
    os.utime(other, ns=times)
    other.replace(path)
    assert digest(path, kept) == file_digest(path)


@pytest.mark.parametrize(
    ("ticks", "age", "is_kept"),
    [("fine", 0.05, False), ("fine", 0.15, True), ("whole", 0.15, False), ("whole", 1.9, False), ("whole", 2.1, True)],
)
def test_a_file_is_remembered_once_another_write_would_give_it_other_times(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, ticks: str, age: float, is_kept: bool
) -> None:
    path, kept = tmp_path / "a.jsonl", tmp_path / "digests.json"
    path.write_text("one")
    if ticks == "whole":  # as file systems without parts of a second have it
        os.utime(path, (1_700_000_000, 1_700_000_000))
    found = path.stat()
    now = max(found.st_mtime_ns, found.st_ctime_ns) + int(age * 1e9)
    monkeypatch.setattr(time, "time_ns", lambda: now)
    digest(path, kept)
    digest(path, kept)
    assert hashed == [path] * (1 if is_kept else 2)
    assert kept.exists() == is_kept


@pytest.mark.usefixtures("later")
def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = tmp_path / "a.jsonl", tmp_path / "digests.json"
    path.write_text("one")

    def change(found: Path) -> str:
        before = file_digest(found)
        found.write_text("another")
        return before

    monkeypatch.setattr(contents, "file_digest", change)
    digest(path, kept)
    assert not kept.exists()


def swap(kept: Path) -> None:
    saved = json.loads(kept.read_text())
    for known in saved["files"].values():
        known["digest"] = "0" * 64
    kept.write_text(json.dumps(saved))


SPOILERS: dict[str, Callable[[Path], object]] = {
    "cut": lambda kept: kept.write_bytes(kept.read_bytes()[:-9]),
    "empty": lambda kept: kept.write_bytes(b""),
    "binary": lambda kept: kept.write_bytes(bytes(range(256))),
    "another": lambda kept: kept.write_text('{"files": {"a": 1}, "proof": "x"}'),
    "changed": swap,
    "folder": lambda kept: (kept.unlink(), kept.mkdir()),
}


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("spoiler", SPOILERS)
def test_damaged_digests_are_made_again(tmp_path: Path, hashed: list[Path], spoiler: str) -> None:
    path, kept = tmp_path / "a.jsonl", tmp_path / "digests.json"
    path.write_text("one")
    digest(path, kept)
    SPOILERS[spoiler](kept)
    assert digest(path, kept) == file_digest(path)
    assert hashed == [path, path]


@pytest.mark.usefixtures("later")
def test_the_files_hashed_last_stay(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MOST_FILES", 2)
    for name in ("a", "b", "c", "a", "c"):
        (tmp_path / name).touch()
    for name in ("a", "b", "c", "c", "b"):
        digest(tmp_path / name, tmp_path / "digests.json")
    assert [path.name for path in hashed] == ["a", "b", "c"]
