"""``select=best``: every member on one half, the best one on the other, once; and what it takes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain import ledger
from posttrain.config.schema import Half
from posttrain.gate.spec import GateRequest, Verdict
from posttrain.hookspecs import hookimpl
from tests.support.command import main
from tests.support.fakes import GATES, Script, scripted_host, write_project
from tests.support.judgements import task_verdict

SWEEP = ("-m", "recipe=mine", "seed=1,2", "stages=[sft]", "select=best", GATES[0])
SLURM = ("launch=slurm", "launch.processes=1")


class Halves(Script):
    """A gate whose lift depends on the artifact, in the order of training, and on the half."""

    def __init__(self, choosing: dict[int, float], judging: dict[int, str]) -> None:
        super().__init__()
        self.choosing, self.judging = choosing, judging
        self.numbers: dict[str, int] = {}
        self.asked: list[tuple[int, str]] = []

    @hookimpl
    def judge_artifact(self, request: GateRequest) -> Verdict:
        number = self.numbers.setdefault(request.systems["candidate"].digest, len(self.numbers) + 1)
        self.asked.append((number, request.gate.half.value))
        if request.gate.half is Half.judging:
            state: Any = self.judging[number]
            return Verdict(state=state, gated=True, tasks=(task_verdict(state),), reason="judged")
        lift = self.choosing[number]
        state = "pass" if lift > 0 else "fail"
        return Verdict(state=state, gated=True, tasks=(replace(task_verdict(state), lift=lift),), reason="asked")


@pytest.fixture
def project(working_folder: Path) -> None:
    write_project(working_folder)


def given(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    host = scripted_host(script)
    monkeypatch.setattr("posttrain.host.plugins.load", lambda: host)


def test_the_best_on_one_half_is_judged_once_on_the_other(
    project: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Halves({1: 0.1, 2: 0.3}, {2: "pass"})
    given(script, monkeypatch)
    assert main(*SWEEP) == 0
    assert script.asked == [(1, "choosing"), (2, "choosing"), (2, "judging")]
    assert script.trained == ["sft"] * 2  # the judged one is not trained again
    stages = [json.loads(path.read_text())["stages"][0]["state"] for path in Path("runs").glob("mine-*/run.json")]
    assert sorted(stages) == ["promoted", "undecided", "undecided"]
    rows = [row.lift for row in ledger.lifts(Path("runs"))]
    assert [(row.tried, row.verdict) for row in rows] == [(1, "undecided"), (1, "undecided"), (2, "pass")]
    table = capsys.readouterr().out.rpartition("differs in")[2]
    assert "chosen from 2" in " ".join(table.split())
    assert table.count("for choosing") == 2
    assert "half=" not in table
    files = sorted(Path("runs").glob("mine-*"))
    script.judged.clear()
    assert main(*SWEEP) == 0  # the same command asks nothing again
    assert not script.judged
    assert len(script.trained) == 2
    assert sorted(Path("runs").glob("mine-*")) == files
    assert len(ledger.lifts(Path("runs"))) == 3


def test_the_exit_code_is_the_chosen_ones_and_what_failed_is_not_chosen(
    project: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Halves({1: -0.1, 2: 0.2}, {2: "undecided"})
    given(script, monkeypatch)
    assert main(*SWEEP) == 4
    assert script.asked[-1] == (2, "judging")
    script.choosing, script.asked = {1: -0.1, 2: -0.3}, []
    assert main(*SWEEP, "output_root=others") == 3
    assert {half for _, half in script.asked} == {"choosing"}
    assert "none of the 2 members is left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["recipe=mine", "select=best"], "there is no sweep"),
        (["-m", "recipe=mine", "seed=1,2", "select=worst"], "select=best"),
        (["-m", "recipe=mine", "seed=1", "select=best", *GATES], "has one member"),
        (["-m", "recipe=mine", "seed=1,2", "select=best", *GATES, "dpo.gate.enabled=false"], "asks nothing"),
        (["-m", "recipe=mine", "seed=1,2", "select=best", *GATES, *SLURM], "queues them"),
    ],
)
def test_what_cannot_be_chosen_is_rejected_before_anything_runs(
    words: list[str],
    expected: str,
    project: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("bin").mkdir()
    Path("bin/sbatch").write_text("#!/bin/sh\n")
    Path("bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")
    assert main(*words) == 2
    assert expected in capsys.readouterr().err
    assert not list(Path("runs").glob("*/run.json"))
