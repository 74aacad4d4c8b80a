"""A list that was printed is printed again without a plugin, and never once anything that decides it changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.host import index
from posttrain.host.index import Index, files_below
from posttrain.scoring import catalogue
from tests.support.installed import install
from tests.support.warm import PATIENCE

LIST = """
import sys
from posttrain.host import index
index.RECENT = -1e9  # the files of a test are new
from posttrain.cli import main
try:
    main()
finally:
    print("pluggy" in sys.modules, file=sys.stderr)
"""
PLUGIN = """
from dataclasses import dataclass
from posttrain import Settings, hookimpl

@dataclass
class Words:
    count: int = 3
    \"\"\"Words to say.\"\"\"

@hookimpl
def register_settings():
    return [Settings(name="words", summary="SUMMARY", config=Words)]
"""


def listed(*words: str, **environment: str) -> tuple[str, bool]:
    """What the command prints, and whether it was kept: then no plugin is loaded."""
    program = [sys.executable, "-c", LIST, "list", *words]
    result = subprocess.run(
        program, capture_output=True, text=True, env={**os.environ, **environment}, check=False, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr.split()[-1] == "False"


def test_a_list_is_kept_until_a_plugin_a_recipe_or_a_choice_changes(
    tmp_path: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plugins"
    for name in ("plugins", ".cache"):  # the folder of the command is one of Python's paths: a new folder changes it
        (tmp_path / name).mkdir()
    install(folder, monkeypatch, "words", {"words_plugin.py": PLUGIN.replace("SUMMARY", "as it was")})
    made, was_kept = listed("settings")
    again, is_kept = listed("settings")
    assert (was_kept, is_kept) == (False, True)
    assert "as it was" in made
    assert again == made

    (folder / "words_plugin.py").write_text(PLUGIN.replace("SUMMARY", "as it is"), encoding="utf-8")
    changed, was_kept = listed("settings")
    assert (was_kept, "as it is" in changed, "as it was" in changed) == (False, True, False)

    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text("# a recipe of mine\n")
    assert "a recipe of mine" in listed()[0]
    (working_folder / "recipes" / "mine.yaml").write_text("# another recipe of mine\n")
    everything, was_kept = listed()
    assert not was_kept
    assert "another recipe of mine" in everything
    assert listed() == (everything, True)

    without, was_kept = listed("settings", POSTTRAIN_BLOCK_PLUGINS="words")
    assert not was_kept
    assert "as it is" not in without


def test_a_plugin_that_failed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    install(folder, monkeypatch, "torn", {"torn_plugin.py": "raise OSError('no licence today')"})
    for _ in range(2):
        text, was_kept = listed("plugins")
        assert "no licence today" in text
        assert not was_kept


@pytest.fixture
def deciding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that decides a text that is kept."""
    monkeypatch.setattr(index, "RECENT", -1e9)
    path = tmp_path / "deciding" / "a.yaml"
    path.parent.mkdir()
    path.write_text("a")
    Index("words").keep("the text", files_below(str(path.parent)))
    assert Index("words").text == "the text"
    return path


CHANGES: dict[str, Callable[[Path], object]] = {
    "changed": lambda path: path.write_text("b"),
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("b.yaml")),
    "a file beside it": lambda path: path.with_name("b.yaml").touch(),
    "a folder beside it": lambda path: path.with_name("b").mkdir(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_of_a_file_that_decides_is_seen(deciding: Path, change: Callable[[Path], object]) -> None:
    change(deciding)
    assert Index("words").text is None


def kept_file() -> Path:
    (path,) = Path(index.folder()).iterdir()
    return path


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "another text": lambda path: path.write_bytes(path.read_bytes().replace(b"the text", b"the lies")),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_none(deciding: Path, damage: Callable[[Path], object]) -> None:
    damage(kept_file())
    assert Index("words").text is None
    Index("words").keep("the text", [str(deciding)])  # in a folder's place nothing is written, and nothing raised
    assert Index("words").text in ("the text", None)


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    Index("words").keep("the text", [])
    assert Index("words").text is None


def test_a_file_that_changed_meanwhile_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    Index("words").keep("the text", [str(tmp_path / "new")])
    assert Index("words").text is None


def test_the_situation_decides_and_no_secret_is_written(monkeypatch: pytest.MonkeyPatch, deciding: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    Index("words", index.situation()).keep("with a token", [str(deciding)])
    assert Index("words", index.situation()).text == "with a token"
    assert all(b"hf_0123456789" not in path.read_bytes() for path in Path(index.folder()).iterdir())
    monkeypatch.setenv("SHLVL", "7")
    assert Index("words", index.situation()).text == "with a token"
    monkeypatch.setenv("HF_TOKEN", "another")
    assert Index("words", index.situation()).text is None
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    monkeypatch.chdir(deciding.parent)
    assert Index("words", index.situation()).text is None


def test_the_oldest_give_way(deciding: Path) -> None:
    for number in range(index.MOST_KEPT + 5):
        Index(number).keep(str(number), [str(deciding)])
    assert len(list(Path(index.folder()).iterdir())) == index.MOST_KEPT


def test_tasks_of_lm_eval_are_read_once_for_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "RECENT", -1e9)
    folder = tmp_path / "tasks"
    (folder / "family").mkdir(parents=True)
    (folder / "family" / "one.yaml").write_text("task: one\n")
    monkeypatch.setattr(catalogue, "tasks_folder", lambda: folder)
    catalogue.registered_tasks.cache_clear()
    try:
        assert catalogue.registered_tasks() == {"one": folder / "family" / "one.yaml"}
        catalogue.registered_tasks.cache_clear()
        with monkeypatch.context() as reading:
            reading.setattr(catalogue, "_content", lambda path: pytest.fail(f"{path} is read"))
            assert catalogue.registered_tasks() == {"one": folder / "family" / "one.yaml"}
        (folder / "family" / "one.yaml").write_text("task: two\n")
        catalogue.registered_tasks.cache_clear()
        assert set(catalogue.registered_tasks()) == {"two"}
    finally:
        catalogue.registered_tasks.cache_clear()


def test_an_index_is_json_below_its_digest(deciding: Path) -> None:
    digest, _, content = kept_file().read_text().partition("\n")
    assert len(digest) == 32
    assert set(json.loads(content)) == {"text", "state", "paths"}
    assert deciding.name in content
