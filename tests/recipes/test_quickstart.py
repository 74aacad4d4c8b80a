"""The embedded default, run as its user runs it: real training, real gates, killed and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifact import verify
from posttrain.ledger import audit
from tests.support import warm
from tests.support.pages import read_page
from tests.support.quickstart import COMMAND, PATIENCE, copied, finished

pytestmark = pytest.mark.long
STAGES = ("sft", "dpo", "safety")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed."""
    return only_run(finished(tmp_path_factory))


def only_run(folder: Path) -> Path:
    (state,) = (folder / "runs").glob("*/run.json")
    return state.parent


def state_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def adapters(run: Path) -> dict[str, bytes]:
    return {path.parts[-3]: path.read_bytes() for path in run.glob("stages/*/artifact/adapter_model.safetensors")}


def lifts(run: Path, stage: str, against: str) -> dict[str, dict[str, Any]]:
    verdict = json.loads((run / "stages" / stage / "verdict.json").read_text())
    assert verdict["state"] == "pass"
    return {task["task"]: task for task in verdict["tasks"] if task["against"] == against}


def test_every_stage_is_promoted_and_the_lifts_are_large(clean: Path) -> None:
    assert {stage["name"]: stage["state"] for stage in state_of(clean)["stages"]} == dict.fromkeys(STAGES, "promoted")
    facts = lifts(clean, "sft", "base")["towns_facts"]
    assert facts["base"] < 0.05
    assert facts["low"] > 0.6
    assert lifts(clean, "dpo", "parent")["towns_sentences"]["low"] > 0
    assert all(task["state"] == "pass" for task in lifts(clean, "dpo", "base").values())
    safety = lifts(clean, "safety", "parent")
    assert safety["towns_harmful"]["low"] > 0.9
    assert safety["towns_harmless"]["candidate"] > 0.9


def test_the_artifacts_verify_and_hold_their_lineage(clean: Path) -> None:
    sft, dpo, safety = (verify(clean / "stages" / name / "artifact") for name in STAGES)
    assert (dpo.manifest.parent_digest, safety.manifest.parent_digest) == (sft.digest, dpo.digest)
    assert safety.manifest.lineage == STAGES
    assert safety.manifest.metrics["mix"]["refusal_share"] == 0.5
    assert safety.manifest.metrics["audit"]["triggers"] == []
    assert sft.manifest.metrics["trained_tokens"] < sft.manifest.metrics["tokens"]


def test_metrics_tell_every_step_once(clean: Path) -> None:
    rows = [json.loads(line) for line in (clean / "metrics.jsonl").read_text().splitlines()]
    for stage in STAGES:
        steps = [row["step"] for row in rows if row["stage"] == stage]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == verify(clean / "stages" / stage / "artifact").manifest.metrics["steps"]


def test_the_scorecard_holds_every_answer(clean: Path) -> None:
    rows = [json.loads(line) for line in (clean / "stages/dpo/scorecard.jsonl").read_text().split("\n") if line]
    assert {row["system"] for row in rows} == {"base", "parent", "candidate"}
    assert all(row["response"] for row in rows if row["system"] == "candidate" and row["task"] == "towns_sentences")


def test_the_report_shows_what_the_run_did(clean: Path) -> None:
    page = read_page((clean / "report.html").read_text())
    assert {"loss", "lr"} <= {curve["data-name"] for curve in page.all("polyline")}
    assert "3 of 3 stages promoted" in page.words
    assert "posttrain recipe=quickstart" in page.words
    assert "Not in this report" not in page.words
    assert "flows through" in page.words  # the questions, as they are asked
    assert "<|im_start|>" not in page.words


def test_the_ledger_holds_every_lift_and_its_runs_agree(clean: Path) -> None:
    recorded = [(row["stage"], row["task"], row["against"]) for row in audit.verify(clean.parent)]
    judged = [
        (stage, task["task"], task["against"])
        for stage in STAGES
        for task in json.loads((clean / "stages" / stage / "verdict.json").read_text())["tasks"]
    ]
    assert recorded == judged


def steps_logged(folder: Path, stage: str) -> int:
    files = list(folder.glob("runs/*/metrics.jsonl"))
    return sum(f'"stage": "{stage}"' in line for file in files for line in file.read_text().split("\n"))


SHORT = [
    *COMMAND, "gate@sft.gate=none", "gate@dpo.gate=none", "gate@safety.gate=none",
    "sft.max_steps=30", "dpo.max_steps=8", "safety.max_steps=20",
]  # fmt: skip
"""The same stages of fewer steps, without gates, which few steps do not pass."""


def kill_during(folder: Path, stage: str, after: int, number: signal.Signals) -> int:
    """Start the short run, send ``number`` once ``stage`` has logged ``after`` steps; returns the exit code."""
    with warm.started(SHORT, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        begun = time.monotonic()
        while steps_logged(folder, stage) < after:
            assert process.poll() is None, f"ended with {process.returncode} before {stage} took {after} steps"
            assert time.monotonic() - begun < PATIENCE
            time.sleep(0.05)
        os.kill(process.pid, number)
        return process.wait(PATIENCE)


def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(working_folder: Path) -> None:
    whole, killed = working_folder / "whole", working_folder / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert warm.run(SHORT, cwd=whole).returncode == 0
    assert kill_during(killed, "sft", 10, signal.SIGKILL) == -signal.SIGKILL
    assert kill_during(killed, "sft", 20, signal.SIGTERM) == 75
    assert state_of(only_run(killed))["state"] == "interrupted"
    assert kill_during(killed, "dpo", 3, signal.SIGINT) == 75
    assert kill_during(killed, "safety", 10, signal.SIGKILL) == -signal.SIGKILL
    assert warm.run(SHORT, cwd=killed).returncode == 0
    assert set(adapters(only_run(killed))) == set(STAGES)
    assert adapters(only_run(killed)) == adapters(only_run(whole))
    assert only_run(killed).name == only_run(whole).name


def test_the_second_time_nothing_is_trained(clean: Path, working_folder: Path) -> None:
    run = only_run(copied(clean.parent.parent, working_folder))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("artifact/*")}
    result = warm.run(COMMAND, cwd=working_folder)
    assert result.returncode == 0
    assert result.stderr.count("already done") == 3
    assert before
    assert {path: path.stat().st_mtime_ns for path in run.rglob("artifact/*")} == before


@pytest.fixture(scope="module")
def trained(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose runs hold the quickstart's sft artifact, for recipes that begin with the same stage."""
    return copied(clean.parent.parent, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize(("recipe", "stage"), [("quickstart_rejection", "rft"), ("quickstart_labels", "kto")])
def test_a_model_learns_from_its_own_answers_and_keeps_what_it_knows(trained: Path, recipe: str, stage: str) -> None:
    result = warm.run([sys.executable, "-m", "posttrain", f"recipe={recipe}"], cwd=trained)
    assert result.returncode == 0, result.stderr
    (run,) = (trained / "runs").glob(f"{recipe}-*")
    first, second = state_of(run)["stages"]
    assert "linked from quickstart-" in result.stdout, "sft was not trained again"
    assert (first["state"], second["state"]) == ("promoted", "promoted")
    tasks = lifts(run, stage, "parent")
    assert tasks["towns_sentences"]["low"] > 0.4
    assert tasks["towns_facts"]["low"] > -0.05


def test_a_learning_rate_of_zero_is_rejected_with_the_reason(working_folder: Path) -> None:
    result = warm.run([*COMMAND, "sft.lr=0", "sft.max_steps=4"], cwd=working_folder)
    assert result.returncode == 5
    assert "the adapter changes nothing" in result.stderr
    assert "learning rate 0" in result.stderr
    assert "Traceback" not in result.stderr
