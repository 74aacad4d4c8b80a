"""The cache of preparations: found again by content, never trusted when it is damaged or of another version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.config.preparation import PrepareConfig
from posttrain.data.records import Conversation
from posttrain.errors import ArtifactDamaged
from posttrain.prepare import kept as cache
from posttrain.prepare.kept import LEDGER, SUMMARY, Kept
from posttrain.prepare.ledger import Ledger
from posttrain.prepare.preparation import Preparation

KEY = "0123"


def ledger() -> Ledger:
    turns = ({"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f"})
    rows = [Conversation(messages=turns, where=f"a:{at}") for at in (1, 2)]
    return Preparation(trained=rows, config=PrepareConfig(), judges={}).run()


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return cache.keep(tmp_path, KEY, ledger(), {})


def find(root: Path) -> tuple[Kept | None, list[str]]:
    notes: list[str] = []
    return cache.find(root, KEY, notes.append), notes


def test_a_preparation_is_found_again(kept: Kept, tmp_path: Path) -> None:
    found, notes = find(tmp_path)
    assert found == kept
    assert notes == []
    assert found is not None
    assert [*found.rows()] == [0]
    assert found.summary.dropped == {"exact": 1}
    assert cache.find(tmp_path, "other", notes.append) is None
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


@pytest.mark.parametrize("name", [LEDGER, SUMMARY])
@pytest.mark.parametrize("content", [b"", b"PAR1 of someone else", b"{}"])
def test_a_damaged_file_is_named_and_the_rows_are_prepared_again(
    kept: Kept, tmp_path: Path, name: str, content: bytes
) -> None:
    (kept.folder / name).write_bytes(content)
    found, notes = find(tmp_path)
    assert found is None
    assert name in notes[0]
    assert cache.keep(tmp_path, KEY, ledger(), {}) == kept
    assert find(tmp_path) == (kept, [])


@pytest.mark.parametrize("change", [{"layout": 0}, {"key": "4567"}])
def test_a_cache_of_another_version_is_not_used(kept: Kept, tmp_path: Path, change: dict[str, object]) -> None:
    path = kept.folder / SUMMARY
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert find(tmp_path) == (None, [f"prepared again: {path} is of another preparation"])


def test_a_ledger_that_changes_after_it_was_found_is_not_read(kept: Kept) -> None:
    kept.ledger.write_bytes(kept.ledger.read_bytes()[:-1])
    with pytest.raises(ArtifactDamaged, match=r"ledger\.parquet is damaged"):
        kept.rows()


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write_synced", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.keep(tmp_path, KEY, ledger(), {})
    assert find(tmp_path) == (None, [])
    assert list(tmp_path.iterdir()) == []


def test_the_digest_of_kept_rows_is_empty_when_all_stay() -> None:
    assert cache.kept_digest(ledger()) != ""
    one = Preparation(trained=ledger().records[:1], config=PrepareConfig(), judges={}).run()
    assert cache.kept_digest(one) == ""
