"""The stage on two processes: the answers of one, its numbers to rounding, and the same bytes when resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain import Stage, StageContext, hookimpl
from posttrain.config.schema import LaunchConfig
from posttrain.launch.job import FOLDER, JOB, write_job
from posttrain.testing import Project

ROOT = Path(__file__).parents[3]
WORDS = ("red", "blue", "green", "clay", "ash", "elm", "ivy", "oak", "fir", "sky")
QUESTIONS = [{"question": f"a {word}", "answer": "[a-p]", "match": "regex"} for word in WORDS]
SETTINGS: dict[str, Any] = {
    "lr": 1e-2, "epochs": 1, "k": 3, "temperature": 3.0, "max_tokens": 12, "reward": {"regex": 1.0, "ended": 0.5},
    "per_device_batch_size": 2, "gradient_accumulation": 2, "beta": 0.05, "updates": 2, "eval_share": 0.3,
    "eval_steps": 2, "gradient_checkpointing": False, "checkpoint_steps": 1,
}  # fmt: skip
"""Seven questions are trained, four and three in a sampling, so that one process has fewer than the other."""


class Seen:
    """A plugin that sees the context of the stage."""

    @hookimpl(tryfirst=True)
    def run_stage(self, stage: Stage, context: StageContext) -> None:
        """Keep what the stage is given."""
        self.stage, self.context = stage, replace(context, metrics={})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The stage of a run on one process, and the folder of the same on two."""
    folder, seen = tmp_path_factory.mktemp("several"), Seen()
    (folder / "project").mkdir()
    project = Project(folder=folder / "project", kind="grpo", settings=SETTINGS, records=QUESTIONS).write()
    run = project.run(folder / "runs", also=[seen]).path
    several = folder / "two"
    (several / FOLDER).mkdir(parents=True)
    context = replace(seen.context, engine="ddp")
    write_job(several / JOB, seen.stage, context, origin="", world=2, launch=LaunchConfig())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    places = [ROOT, ROOT / "plugins/grpo", Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, places))}
    done = subprocess.run(
        [*command, "grpo_support.several", str(several / JOB)],
        cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return run, several


def lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def test_the_answers_are_those_of_one_process(trained: tuple[Path, Path]) -> None:
    run, several = trained
    expected = lines(run / "stages" / "grpo" / "answers")
    found = lines(several / "whole" / "trail")
    assert found.keys() == expected.keys()
    assert {len(each) for name, each in found.items() if name.startswith("step")} == {12, 9}
    for name, answers in expected.items():
        assert [each.pop("advantage", 0.0) for each in found[name]] == pytest.approx(
            [each.pop("advantage", 0.0) for each in answers], abs=1e-6
        )
        assert found[name] == answers


def test_losses_rewards_and_weights_are_those_of_one_process(trained: tuple[Path, Path]) -> None:
    run, several = trained
    expected = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((several / "whole" / "steps.json").read_text())
    assert [step["step"] for step in expected] == list(map(int, found)) == [0, 1, 2, 3, 4]
    assert found["1"]["clipped"] < found["2"]["clipped"], "the second update is off the policy that wrote the answers"
    for step in expected:
        for name, value in found[str(step["step"])].items():
            assert value == pytest.approx(step[name], abs=1e-6, rel=1e-5), (step["step"], name)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (several / "whole" / "output", run / "stages" / "grpo" / "artifact")
    )
    for name, each in theirs.items():
        torch.testing.assert_close(ours[name], each, rtol=1e-4, atol=1e-6)


def test_stopped_between_two_samplings_it_ends_with_the_same_bytes(trained: tuple[Path, Path]) -> None:
    _, several = trained
    weights = "output/adapter_model.safetensors"
    assert (several / "resumed" / weights).read_bytes() == (several / "whole" / weights).read_bytes()
    told = json.loads((several / "resumed" / "steps.json").read_text())
    assert list(told) == ["3", "4"], "asked to stop after step 1, it went on to the end of the sampling"
    assert lines(several / "resumed" / "trail") == lines(several / "whole" / "trail")
