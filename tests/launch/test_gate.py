"""A gate asked by real processes: one is killed, and the same command goes on to the scores of a single one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifact import ModelSource
from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.config.schema import GateConfig
from posttrain.errors import PosttrainError
from posttrain.gate.spec import GateRequest
from posttrain.launch.gate import GateGroup
from posttrain.launch.outcome import read_outcomes
from posttrain.launch.shape import for_blocks
from posttrain.launch.signs import Signs
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.systems import Loading
from tests.support.adapters import Log
from tests.support.quizzes import gate_task, write_quizzes
from tests.support.tiny import base_source


def never_load(source: ModelSource, dtype: str) -> Any:
    raise AssertionError(f"{source.name} was loaded")


class Killing(Log):
    """Progress that kills a process at the first answers."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__()
        self._folder, self._rank = folder, rank

    def advance(self, system: str, task: str, done: int, total: int, tokens: int = 0) -> None:
        super().advance(system, task, done, total, tokens)
        about = Signs(self._folder / "launch", 2).processes()
        if self._rank in about:
            with contextlib.suppress(ProcessLookupError):  # it is told of once more
                os.kill(about[self._rank]["pid"], signal.SIGKILL)


@pytest.mark.long
def test_a_gate_goes_on_after_the_death_of_a_process_and_scores_as_one_would(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = write_quizzes(working_folder / "quizzes")
    base = base_source(folder / "base")
    request = GateRequest(
        stage="sft", gate=GateConfig(batch_size=3, seed=7), dtype="float32", cache=Path("cache"),
        tasks={name: gate_task(folder, name) for name in ("generate0", "choose0")},
        systems={"base": base, "candidate": replace(base, adapter=folder / "candidate", digest="candidate")},
        scorecard=Path("stage/scorecard.jsonl"),
        launch=GateGroup(launch=LaunchConfig(kind=Launcher.local, processes=2)),
    )  # fmt: skip
    Path("stage").mkdir()
    with pytest.raises(PosttrainError, match=r"rank 1 of 2 on .* was taken down by SIGKILL.*run the same command"):
        evaluate(request, Killing(Path("stage"), 1), Loading(never_load, load_tokenizer, "cpu"))
    assert Path("stage/gate.json").exists()
    assert list(Path("cache").glob("*.?.answers"))
    log = Log()
    card = evaluate(request, log, Loading(never_load, load_tokenizer, "cpu"))
    assert log.notes[0].startswith("2 processes ask ")
    assert int(log.notes[0].split()[3]) < 2 * 2 * 8
    assert {step[:2] for step in log.steps if step[2] == step[3]} == {
        (system, task) for system in request.systems for task in request.tasks
    }
    assert [path.name for path in sorted(Path("stage").iterdir())] == ["questions.jsonl", "scorecard.jsonl"]
    alone = replace(request, launch=None, cache=Path("other"))
    assert evaluate(alone, Log(), Loading(load_model, load_tokenizer, "cpu")) == card
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(working_folder) not in shown


@pytest.mark.parametrize(
    ("launch", "blocks", "world"),
    [
        ((1, 8), 100, (1, 8)),
        ((1, 8), 16, (1, 8)),
        ((1, 8), 15, (1, 7)),
        ((1, 8), 4, (1, 2)),
        ((1, 8), 3, (1, 1)),
        ((1, 8), 0, (1, 1)),
        ((4, 8), 64, (4, 8)),
        ((4, 8), 40, (3, 6)),
        ((4, 8), 7, (1, 3)),
    ],
)
def test_each_process_has_two_blocks_at_least(launch: tuple[int, int], blocks: int, world: tuple[int, int]) -> None:
    found = for_blocks(LaunchConfig(kind=Launcher.slurm, nodes=launch[0], processes=launch[1]), blocks)
    assert (found.nodes, found.processes) == world
    assert found.nodes * (found.processes or 0) * 2 <= max(blocks, 2)


HUNG = """\
import ctypes, os, sys, time
from pathlib import Path
from posttrain.host.supervisor import watch_files
from posttrain.launch.outcome import outcome_of, write_outcome
from posttrain.model import tokenizer_watch
tokenizer_watch.SECONDS = 2.0
watch_files(lambda error: write_outcome(Path(sys.argv[1]), outcome_of(1, error)))
print("watched", flush=True)
with tokenizer_watch.TokenizerWatch(Path("/its/folder")).watching(1234):
    ctypes.PyDLL(None).sleep(600)
"""


def test_a_tokenizer_that_hangs_ends_its_process_with_a_reason(tmp_path: Path) -> None:
    """In compiled code, which no signal interrupts and which lets no other thread run."""
    done = subprocess.run([sys.executable, "-c", HUNG, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "watched\n"), done.stderr
    outcome = read_outcomes(tmp_path, 2)[1]
    hung = "its tokenizer hung and had to be ended after 2.1234 s without a sign of life, at a text of 1,234"
    assert (outcome.code, outcome.problems[0]["where"]) == (2, "/its/folder")
    assert outcome.problems[0]["what"].startswith(hung)


def test_the_watch_ends_with_its_process() -> None:
    code = "import sys; from posttrain.host.supervisor import watch_files; watch_files(print); print(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
