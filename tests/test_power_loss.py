"""A power cut after any prefix of the writes, syncs and renames: the old state or the new one, never a mixture."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.artifact import MANIFEST, publish_folder, verify, verify_folder
from posttrain.config.compose import compose
from posttrain.disk import replace_text
from posttrain.pipeline import run
from posttrain.plan import make_plan
from posttrain.run.display import Display
from posttrain.scoring.cache import Blocks
from tests.support.fakes import GATES, Script, only_run, run_on, scripted_host, states, write_project
from tests.support.power import images, recorded


def test_a_published_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    (disk / "draft" / "inner").mkdir(parents=True)
    with recorded(disk, monkeypatch) as recorder:
        (disk / "draft" / "weights.safetensors").write_bytes(b"weights" * 100)
        (disk / "draft" / "inner" / "config.json").write_text('{"a": 1}')
        publish_folder(disk / "draft", {"stage": "sft"}, disk / "artifact")
    found = Counter[bool]()
    for name, image in images(recorder, tmp_path / "images"):
        if there := (image / "artifact").exists():
            assert verify_folder(image / "artifact")["stage"] == "sft", name
        found[there] += 1
    assert found[True] >= 1
    assert found[False] >= 10


def test_a_replaced_text_is_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    path = disk / "run.json"
    path.write_text("old")
    with recorded(disk, monkeypatch) as recorder:
        replace_text(path, "the new text")
        replace_text(path, "the newest text")
    found = Counter((image / "run.json").read_text() for _, image in images(recorder, tmp_path / "images"))
    assert set(found) == {"old", "the new text", "the newest text"}


def test_without_syncs_the_recorder_finds_the_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "run.json").write_text("old")
    with recorded(disk, monkeypatch) as recorder:
        (disk / "draft").write_text("the new text")
        os.replace(disk / "draft", disk / "run.json")
    found = {(image / "run.json").read_bytes() for _, image in images(recorder, tmp_path / "images")}
    assert found >= {b"old", b"the new text", b"the ne", bytes(12), b""}


def test_kept_answers_are_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    answers = {block: [[f"answer {block}", -1.5]] for block in range(3)}
    with recorded(disk, monkeypatch) as recorder:
        blocks = Blocks(disk / "key.answers", "key", 1)
        for block, given in answers.items():
            blocks.add(block, given)
    for name, image in images(recorder, tmp_path / "images"):
        read = Blocks(image / "key.answers", "key", 1).read()
        assert all(read[block] == answers[block] for block in read), name


@pytest.mark.long
def test_a_run_ends_the_same_after_a_power_cut_anywhere(
    tmp_path: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(working_folder)
    (working_folder / "runs").mkdir()
    host = scripted_host(Script())
    with recorded(working_folder / "runs", monkeypatch) as recorder:
        run_on(host)
    plan = make_plan(compose(host, ["recipe=mine", *GATES]), host)  # one for all the runs that resume
    wanted = {path.name: path.read_bytes() for path in only_run().rglob("artifact/*.safetensors")}
    digests = {path.parent.name: verify(path).digest for path in only_run().rglob("artifact")}
    cuts = 0
    for name, image in images(recorder, tmp_path / "images"):
        _without_ledger(image)
        for artifact in image.glob("*/stages/*/artifact"):
            assert (artifact / MANIFEST).exists(), name
            assert verify(artifact).digest == digests[artifact.parent.name], name
        cuts += 1
        if cuts % 12:  # each is looked at, every twelfth is resumed
            continue
        shutil.rmtree(working_folder / "runs")
        shutil.copytree(image, working_folder / "runs")
        run(plan, host, Display(Console(file=io.StringIO())))
        assert states() == {"sft": "promoted", "dpo": "promoted"}, name
        again = {path.name: path.read_bytes() for path in only_run().rglob("artifact/*.safetensors")}
        assert again == wanted, name
        assert json.loads((only_run() / "run.json").read_text())["state"] == "done"
    assert cuts > 100


def _without_ledger(image: Path) -> None:
    """Remove the ledger: SQLite writes and syncs it outside of Python, and tests power cuts itself."""
    for path in image.glob("ledger*"):
        path.unlink()
