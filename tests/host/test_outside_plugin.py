"""A package from outside of the repository, beside the wheel: its stage runs after the quickstart's, which it finds
trained, is gated, recorded and resumed.

The environment is two folders, into which pip puts the wheel and the package; the dependencies are those that are here,
and nothing of the checkout is on the path.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifact import verify
from tests.support.command import started
from tests.support.quickstart import PATIENCE, copied, finished

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["recipe=quickstart", "+stage@mine=mine", "mine.max_steps=80"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The wheel and the package of a third party, installed into a folder of their own."""
    folder = tmp_path_factory.mktemp("environment")
    site, wheels = folder / "site", folder / "wheels"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    install(site, next(wheels.glob("*.whl")))
    found = {**os.environ, "PYTHONPATH": str(site)}
    program(found, folder, "new-plugin", "mine")
    install(site, folder / "posttrain-mine")
    return found


def install(site: Path, what: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(what)], check=True)


def script(environment: Mapping[str, str]) -> str:
    """The command that the wheel brings."""
    return str(Path(environment["PYTHONPATH"]) / "bin" / "posttrain")


def program(environment: Mapping[str, str], folder: Path, *words: str) -> str:
    command = [script(environment), *words]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def run_of(folder: Path) -> Path:
    """The run with the stage of the third party."""
    (stage,) = (folder / "runs").glob("*/stages/mine")
    return stage.parents[1]


def state_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((run_of(folder) / "run.json").read_text()))


@pytest.mark.long
def test_its_stage_runs_is_gated_recorded_and_resumed(
    environment: Mapping[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copied(finished(tmp_path_factory), tmp_path)
    assert str(environment["PYTHONPATH"]) in program(environment, tmp_path, "list", "recipes", "--json")
    assert "posttrain-mine 0.1.0" in program(environment, tmp_path, "list", "plugins")

    log, command = tmp_path / "log", [script(environment), *WORDS]
    with log.open("w") as stream, started(command, cwd=tmp_path, env=environment, stderr=stream) as run:
        begun = time.monotonic()
        while not [line for path in tmp_path.glob("runs/*/metrics.jsonl") for line in steps(path, "mine")][2:]:
            assert run.poll() is None, log.read_text()
            assert time.monotonic() - begun < PATIENCE
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE) == 75
    *others, mine = state_of(tmp_path)["stages"]
    assert (mine["name"], mine["state"]) == ("mine", "interrupted")
    assert {stage["state"] for stage in others} == {"promoted"}

    said = program(environment, tmp_path, *WORDS)
    assert said.count("already done") == len(others)
    assert "resume after step" in said
    stages = {stage["name"]: stage for stage in state_of(tmp_path)["stages"]}
    assert stages["mine"]["state"] == "promoted"
    artifact = verify(run_of(tmp_path) / "stages/mine/artifact")
    assert artifact.manifest.plugin == "mine (posttrain-mine 0.1.0)"
    assert artifact.manifest.lineage == tuple(stage["kind"] for stage in stages.values())
    assert artifact.manifest.parent_digest == others[-1]["digest"]
    verdict = json.loads((run_of(tmp_path) / "stages/mine/verdict.json").read_text())
    assert verdict["gated"]
    assert {task["task"] for task in verdict["tasks"]} == {"towns_facts", "towns_documents"}
    recorded = program(environment, tmp_path, "ledger", "export")
    assert {row["stage"] for row in map(json.loads, filter(None, recorded.splitlines()))} == set(stages)
    numbers = [row["step"] for row in steps(run_of(tmp_path) / "metrics.jsonl", "mine")]
    assert numbers == list(range(1, artifact.manifest.metrics["steps"] + 1))


def steps(metrics: Path, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    return [row for row in rows if row["stage"] == stage]
