"""A second start on the same data reads no row; whatever a reading depends on brings it back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.context import StageContext
from posttrain.data import mixing
from posttrain.data.held import digest_records
from posttrain.data.records import Record
from posttrain.errors import BadInput
from posttrain.hookspecs import hookimpl
from posttrain.plan import Step
from posttrain.run import readings
from posttrain.testing import Project
from tests.support.fakes import Script, run_recipe, write_project

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}", "mood": "fine"} for number in range(4)]
ROWS += [ROWS[0]]  # preparation leaves it out
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


class Reader(Script):
    """A script that remembers the records of each stage."""

    def __init__(self, given: Callable[[StageContext], Any]) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}
        self.during_training = lambda context: self.seen.update({context.name: given(context)})


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder in which a run has read the data, and what its stage was given."""
    folder = tmp_path_factory.mktemp("started")
    before = Path.cwd()
    os.chdir(folder)
    write_project(folder)
    Path("train.jsonl").write_text(LINES)
    found = start("sft.lr=1e-3")
    os.chdir(before)
    return folder, found


@pytest.fixture(autouse=True)
def first(started: tuple[Path, Any], working_folder: Path) -> Any:
    """What the stage was given in the run that this folder has behind it."""
    shutil.copytree(started[0], working_folder, dirs_exist_ok=True)
    return started[1]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources whose rows were read."""
    found: list[str] = []
    original = mixing.read_records

    def spy(source: Any, *rest: Any) -> Iterator[Any]:
        found.append(Path(source.path).name)
        return original(source, *rest)

    monkeypatch.setattr(mixing, "read_records", spy)
    return found


def known(context: StageContext) -> tuple[int, str]:
    return len(context.records), digest_records(context.records)


def start(*overrides: str, given: Callable[[StageContext], Any] = known, others: Sequence[object] = ()) -> Any:
    """What the sft stage of a run was given."""
    reader = Reader(given)
    run_recipe(reader, "stages=[sft]", *overrides, others=others)
    return reader.seen.get("sft")


def manifest(*overrides: str) -> bytes:
    directory = run_recipe(Script(), *overrides)
    return b"".join(path.read_bytes() for path in sorted(directory.path.glob("stages/*/artifact/manifest.json")))


def test_a_second_start_reads_no_row_and_knows_the_same_of_them(first: Any, read: list[str]) -> None:
    shown = Path("log.txt").read_text()
    assert start("sft.lr=2e-3") == first
    assert first[0] == 4
    assert read == []
    before, after = (
        [line.split("data", 1)[-1] for line in text.splitlines() if " data" in line]
        for text in (shown, Path("log.txt").read_text().removeprefix(shown))
    )
    assert after == before
    assert any("nothing reads these keys of the data: 'mood'" in line for line in after)


def test_a_run_on_remembered_records_is_that_of_records_just_read(read: list[str]) -> None:
    manifest("sft.lr=1e-3", "dpo.lr=1e-3")
    read.clear()
    second = manifest("sft.lr=2e-3", "dpo.lr=1e-3")
    assert read == []
    assert second == manifest("sft.lr=2e-3", "dpo.lr=1e-3", "output_root=other")
    assert read == ["train.jsonl", "pairs.jsonl"]


def test_a_stage_that_asks_for_remembered_records_gets_them(first: Any, read: list[str]) -> None:
    found = start("sft.lr=2e-3", given=lambda context: list(context.records))
    assert [record.messages[0]["content"] for record in found] == [row["prompt"] for row in ROWS[:4]]
    assert (len(found), digest_records(found)) == first
    assert read == ["train.jsonl"]


def test_records_that_changed_before_they_were_asked_for_are_rejected() -> None:
    def late(context: StageContext) -> list[Record]:
        Path("train.jsonl").write_text(LINES.replace("question 3", "question 4"))
        return list(context.records)

    with pytest.raises(BadInput, match="the data changed after it was checked"):
        start("sft.lr=2e-3", given=late)


def change_a_byte() -> None:
    """An edit that keeps size and time of modification."""
    before = Path("train.jsonl").stat()
    Path("train.jsonl").write_text(LINES.replace("question 3", "question 4"))
    os.utime("train.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))


def append_a_row() -> None:
    Path("train.jsonl").write_text(LINES + '{"prompt": "one", "completion": "more"}\n')


def move() -> list[str]:
    Path("train.jsonl").rename("moved.jsonl")
    return ["sft.data=moved.jsonl"]


def set_aside() -> list[str]:
    Path("held.jsonl").write_text('{"prompt": "set", "completion": "aside"}\n')
    return ["sft.eval_data=held.jsonl"]


def change_the_template() -> None:
    Path("base/chat_template.jinja").write_text("another template")


def change_the_tokenizer() -> None:
    Path("base/tokenizer.json").write_text('{"version": "1.0"}')


def kept() -> list[Path]:
    return sorted(Path("runs/cache/readings").iterdir())


def cut() -> None:
    for path in kept():
        path.write_bytes(path.read_bytes()[:-20])


def edit() -> None:
    for path in kept():
        path.write_text(json.dumps({**json.loads(path.read_text()), "warnings": ["all is well"]}))


CHANGES: dict[str, Callable[[], list[str] | None]] = {
    "a byte": change_a_byte,
    "a row": append_a_row,
    "the place": move,
    "limit": lambda: ["sft.data={path: train.jsonl, limit: 2}"],
    "weight": lambda: ["sft.data={path: train.jsonl, weight: 2}"],
    "columns": lambda: ["sft.data={path: train.jsonl, columns: {prompt: completion, completion: prompt}}"],
    "max_bad_share": lambda: ["sft.max_bad_share=0.5"],
    "a rule": lambda: ["sft.prepare.near.action=ignore", "sft.prepare.exact=ignore"],
    "no preparation": lambda: ["sft.prepare.enabled=false"],
    "eval_data": set_aside,
    "the template": change_the_template,
    "the tokenizer": change_the_tokenizer,
    "a cut file": cut,
    "an edited file": edit,
}
SAME_RECORDS = ("max_bad_share", "eval_data", "the template", "the tokenizer", "a cut file", "an edited file")


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_reading_depends_on_brings_it_back(change: str, first: Any, read: list[str]) -> None:
    found = start("sft.lr=2e-3", *(CHANGES[change]() or []))
    assert "train.jsonl" in read or "moved.jsonl" in read
    assert (found == first) == (change in SAME_RECORDS)


def test_other_code_reads_again(read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "_code_digest", lambda *modules: "other")
    start("sft.lr=2e-3")
    assert read == ["train.jsonl"]


def test_a_seed_reads_again_only_where_it_draws_records(read: list[str]) -> None:
    start("seed=2")
    assert read == []
    half = "sft.data={path: train.jsonl, weight: 0.5}"
    start("seed=1", half)
    read.clear()
    start("seed=2", half)
    assert read == ["train.jsonl"]


class Dropper:
    """A plugin that leaves out a record, of its own accord."""

    def __init__(self) -> None:
        self.left_out = 0

    @hookimpl(wrapper=True)
    def load_records(self, step: Step) -> Generator[None, Sequence[Record], Sequence[Record]]:
        return (yield)[self.left_out :]


def test_records_that_a_plugin_has_a_part_in_are_read_at_every_start(first: Any, read: list[str]) -> None:
    plugin = Dropper()
    assert start("sft.lr=2e-3", others=[plugin]) == first
    plugin.left_out = 2
    assert start("sft.lr=3e-3", others=[plugin])[0] == 3
    assert read == ["train.jsonl"] * 2
    assert start("sft.lr=4e-3") == first, "what it did is not remembered for a run without it"


def test_a_damaged_store_of_rows_is_made_again_from_remembered_records(tmp_path: Path, read: list[str]) -> None:
    settings = {"max_steps": 1, "per_device_batch_size": 1, "gradient_accumulation": 1}
    project = Project(folder=tmp_path / "project", kind="sft", settings=settings)
    project.folder.mkdir()
    project.write()

    def adapter(output: str, seed: int) -> bytes:
        directory = project.run(tmp_path / output, f"seed={seed}", "data_workers=1")
        return (directory.path / "stages/sft/artifact/adapter_model.safetensors").read_bytes()

    adapter("runs", 1)
    read.clear()
    (ids,) = (tmp_path / "runs/cache/tokens").glob("*/ids.bin")
    ids.write_bytes(bytes([ids.read_bytes()[0] ^ 1]) + ids.read_bytes()[1:])
    damaged = adapter("runs", 2)
    assert read == ["records.jsonl"]
    assert damaged == adapter("fresh", 2)
