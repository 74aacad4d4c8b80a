"""The stage on two processes: the answers of one, its numbers to rounding, and the same bytes when resumed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_support.gate import gate_words
from safetensors.torch import load_file

from posttrain import Stage, StageContext, hookimpl
from posttrain.config.launch import LaunchConfig
from posttrain.launch.job import FOLDER, JOB, write_job
from posttrain.testing import Project
from tests.support.training import together

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[3]
WORDS = ("red", "blue", "green", "clay", "ash", "elm", "ivy", "oak", "fir", "sky")
QUESTIONS = [{"question": f"a {word}", "answer": "[a-p]", "match": "regex"} for word in WORDS]
SETTINGS: dict[str, Any] = {
    "lr": 1e-2, "epochs": 1, "k": 3, "temperature": 3.0, "max_tokens": 12, "reward": {"regex": 1.0, "ended": 0.5},
    "per_device_batch_size": 2, "gradient_accumulation": 2, "beta": 0.05, "updates": 2, "eval_share": 0.3,
    "eval_steps": 2, "gradient_checkpointing": False, "checkpoint_steps": 1,
}  # fmt: skip
"""Seven questions are trained, four and three in a sampling, so that one process has fewer than the other."""
# random weights rarely answer well, but some answers end
FULL = SETTINGS | {"max_tokens": 24, "reward": "ended", "beta": 0.1, "updates": 1, "lr": 1e-3, "eval_share": 0.0}
FULL |= {"eval_steps": None, "max_steps": 2}
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"


class Seen:
    """A plugin that sees the context of the stage."""

    @hookimpl(tryfirst=True)
    def run_stage(self, stage: Stage, context: StageContext) -> None:
        """Keep what the stage is given."""
        self.stage, self.context = stage, replace(context, metrics={})


@dataclass(frozen=True)
class Trained:
    """The stage of a run on one process, and the folder of the same on two."""

    run: Path
    several: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What the run on one process reported."""
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


def begin(folder: Path, settings: dict[str, Any], *, full: bool) -> tuple[Trained, Path]:
    """Run the stage on one process, and write the job of the same for two."""
    seen = Seen()
    (folder / "project").mkdir(parents=True)
    project = Project(folder=folder / "project", kind="grpo", settings=settings, records=QUESTIONS, full=full).write()
    run = project.run(folder / "runs", *gate_words(project), "grpo.gate.on_fail=warn", also=[seen]).path
    (folder / "two" / FOLDER).mkdir(parents=True)
    job = folder / "two" / JOB
    write_job(job, seen.stage, replace(seen.context, engine="ddp"), origin="", world=2, launch=LaunchConfig())
    return Trained(run, folder / "two"), job


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("several")
    adapter, job = begin(folder / "adapter", SETTINGS, full=False)
    full, full_job = begin(folder / "full", FULL, full=True)
    places = [ROOT, ROOT / "plugins/grpo", Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
    together(
        2, "grpo_support.several", str(job), str(full_job),
        environment={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
    )  # fmt: skip
    return {"adapter": adapter, "full": full}


@pytest.fixture
def trained(both: dict[str, Trained], engine: str) -> Trained:
    return replace(both["adapter"], several=both["adapter"].several / engine)


def lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def assert_same_steps(expected: list[dict[str, Any]], folder: Path) -> None:
    found = json.loads((folder / "steps.json").read_text())
    assert [step["step"] for step in expected] == list(map(int, found))
    for step in expected:
        for name, value in found[str(step["step"])].items():
            assert value == pytest.approx(step[name], abs=1e-6, rel=1e-5), (step["step"], name)


def assert_same_weights(run: Path, folder: Path, name: str) -> None:
    ours, theirs = load_file(folder / "output" / name), load_file(run / "stages" / "grpo" / "artifact" / name)
    assert ours.keys() == theirs.keys()
    for key, each in theirs.items():
        torch.testing.assert_close(ours[key], each, rtol=1e-4, atol=1e-6)


engines = pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])


@engines
def test_the_answers_are_those_of_one_process(trained: Trained) -> None:
    expected = lines(trained.run / "stages" / "grpo" / "answers")
    found = lines(trained.several / "whole" / "trail")
    assert found.keys() == expected.keys()
    assert {len(each) for name, each in found.items() if name.startswith("step")} == {12, 9}
    for name, answers in expected.items():
        assert [each.pop("advantage", 0.0) for each in found[name]] == pytest.approx(
            [each.pop("advantage", 0.0) for each in answers], abs=1e-6
        )
        assert found[name] == answers


@engines
def test_losses_rewards_and_weights_are_those_of_one_process(trained: Trained) -> None:
    steps = trained.steps
    assert [step["step"] for step in steps] == [0, 1, 2, 3, 4]
    assert steps[1]["clipped"] < steps[2]["clipped"], "the second update is off the policy that wrote the answers"
    assert steps[1]["kl"] == 0.0 < steps[2]["kl"]
    assert_same_steps(steps, trained.several / "whole")
    assert_same_weights(trained.run, trained.several / "whole", ADAPTER)


@engines
def test_resumed_between_two_samplings_it_ends_with_the_same_bytes(trained: Trained) -> None:
    whole, resumed = trained.several / "whole", trained.several / "resumed"
    assert (resumed / "output" / ADAPTER).read_bytes() == (whole / "output" / ADAPTER).read_bytes()
    told = json.loads((resumed / "steps.json").read_text())
    assert list(told) == ["3", "4"], "it goes on behind a sampling; asked to stop amid one, it went on to its end"
    assert lines(resumed / "trail") == lines(whole / "trail")


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_full_weights_in_slices_are_trained_as_on_one_process(both: dict[str, Trained], engine: str) -> None:
    full = both["full"]
    steps = full.steps
    _, first, *others = steps  # before the first, the gate alone is asked
    assert first["kl"] == 0.0
    assert all(step["kl"] > 0 for step in others)
    assert any(step["spread"] > 0 for step in (first, *others))
    assert_same_steps(steps, full.several / engine / "whole")
    assert_same_weights(full.run, full.several / engine / "whole", WEIGHTS)
