"""What others see of a run while its process works, and after it was killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.disk import lock
from tests.support import warm
from tests.support.command import main
from tests.support.fakes import Script, only_run, run_json, run_recipe, states, write_project
from tests.support.pages import read_page

WORKS = """
import time
from tests.support.fakes import Script, run_recipe

def work(context):
    if context.name == "dpo":
        print("at work", flush=True)
        time.sleep(600)

script = Script()
script.during_training = work
run_recipe(script, "seed=7")
"""


@pytest.fixture
def at_work(working_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the second stage of a run."""
    write_project(working_folder)
    with warm.started([sys.executable, "-c", WORKS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "at work":
            assert process.poll() is None
        yield process
        process.kill()


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert main("runs", "--format", "json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    return dict(row)


def test_a_killed_run_is_interrupted_and_a_working_one_is_running(
    at_work: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    row = listed(capsys)
    assert (row["state"], row["resume"]) == ("running", "")
    at_work.send_signal(signal.SIGKILL)
    at_work.wait()
    assert run_json()["state"] == "running"  # nobody was left to write it
    row = listed(capsys)
    assert row["state"] == "interrupted"
    assert row["lifts"][1] == "dpo: interrupted"
    assert row["resume"].startswith("posttrain recipe=mine ")
    assert row["resume"].endswith(" seed=7")
    assert main("runs") == 0
    assert "was interrupted; this resumes it: posttrain recipe=mine" in capsys.readouterr().out
    assert main("report") == 0
    assert "interrupted" in read_page((only_run() / "report.html").read_text()).text
    script = Script()
    run_recipe(script, "seed=7")
    assert script.trained == ["dpo"]
    assert states() == {"sft": "promoted", "dpo": "promoted"}
    assert listed(capsys)["state"] == "done"


def test_what_another_machine_left_running_is_not_judged(
    at_work: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    at_work.kill()
    at_work.wait()
    held = only_run() / ".lock"
    held.write_text("process 12 on another.example, started 2026-01-01T00:00:00+00:00,\n")
    assert listed(capsys)["state"] == "running"
    held.unlink()  # as in a copy of the folder
    assert listed(capsys)["state"] == "interrupted"


def test_a_look_at_a_run_does_not_keep_its_command_from_resuming(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(working_folder)
    run_recipe(Script())
    with (only_run() / ".lock").open("r+") as look:
        assert lock(look)
        monkeypatch.setattr("posttrain.run.directory.time.sleep", lambda seconds: look.close())
        run_recipe(Script())
    assert run_json()["state"] == "done"
