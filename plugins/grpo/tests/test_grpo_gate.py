"""The stage's own gate, followed while it trains: its scores are the gate's, and no weight changes by them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from grpo_support.gate import gate_words

from posttrain import Interrupted, hookimpl
from posttrain.gate.spec import GateProgress, GateRequest, Scorecard
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.systems import Loading
from posttrain.testing import Project
from posttrain.testing.conformance import AtStep

SETTINGS: dict[str, Any] = {
    "lr": 1e-1, "epochs": 2, "k": 4, "temperature": 3.0, "max_tokens": 12, "reward": {"regex": 1.0, "ended": 0.5},
    "per_device_batch_size": 2, "gradient_accumulation": 2, "checkpoint_steps": 1, "gradient_checkpointing": False,
    "max_steps": 4,
}  # fmt: skip
WORDS = ("red", "blue", "green", "clay", "ash", "elm", "ivy", "oak")
QUESTIONS = [{"question": f"a {word}", "answer": "[a-p]", "match": "regex"} for word in WORDS]
WEIGHTS = "stages/grpo/artifact/adapter_model.safetensors"


class RealEvaluator:
    """The gate's own scoring, which keeps its scorecard."""

    card: Scorecard

    @hookimpl(tryfirst=True)
    def evaluate_artifact(self, request: GateRequest, progress: GateProgress) -> Scorecard:
        """Ask the published artifact."""
        self.card = evaluate(request, progress, Loading(load_model, load_tokenizer, "cpu"))
        return self.card


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("gate")
    return Project(folder=folder, kind="grpo", settings=SETTINGS, records=QUESTIONS).write()


@pytest.fixture(scope="module")
def words(project: Project) -> list[str]:
    """The override of a gate with two tasks on own questions, each right by another pattern."""
    return [*gate_words(project), "grpo.gate.on_fail=warn", "grpo.gate.on_undecided=warn", "grpo.eval_steps=2"]


@pytest.fixture(scope="module")
def run(project: Project, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scorecard]:
    gate = RealEvaluator()
    return project.run(tmp_path_factory.mktemp("run"), *words, also=[gate]).path, gate.card


def steps(run: Path) -> dict[int, dict[str, Any]]:
    return {step["step"]: step for step in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def figures(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "stages" / "grpo" / "artifact" / "manifest.json").read_text())["metrics"]
    return found


def test_before_and_after_training_the_scores_are_the_gates_own(run: tuple[Path, Scorecard]) -> None:
    path, card = run
    told = steps(path)
    assert [step for step, each in told.items() if "eval_gate_early" in each] == [0, 2, 4]
    ends = set()
    for step, system in ((0, "parent"), (4, "candidate")):
        for task in ("early", "late"):
            rows = [row.metrics["right"] for row in card.rows if (row.system, row.task) == (system, task)]
            assert len(rows) == 6
            assert told[step][f"eval_gate_{task}"] == pytest.approx(fmean(rows), abs=1e-12)
            ends.add(fmean(rows))
    assert len(ends) > 1, "the test says nothing where all scores are equal"
    found = figures(path)["gate_sample"]["early"]
    assert found == {
        "metric": "right", "role": "lift", "documents": 6, "first": told[0]["eval_gate_early"],
        "last": told[4]["eval_gate_early"],
    }  # fmt: skip


def test_no_weight_changes_by_a_gate_that_is_followed(
    project: Project, run: tuple[Path, Scorecard], tmp_path: Path
) -> None:
    plain = project.run(tmp_path, "grpo.gate.enabled=false").path
    assert (plain / WEIGHTS).read_bytes() == (run[0] / WEIGHTS).read_bytes()
    assert not any(name.startswith("eval_gate") for step in steps(plain).values() for name in step)
    assert "gate_sample" not in figures(plain)


def test_a_resumed_training_knows_the_scores_before_it(
    project: Project, words: list[str], run: tuple[Path, Scorecard], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        project.run(tmp_path, *words, also=[AtStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    resumed = project.run(tmp_path, *words).path
    assert figures(resumed)["gate_sample"] == figures(run[0])["gate_sample"]


def test_a_gate_that_cannot_be_asked_is_named_and_the_training_goes_on(project: Project, tmp_path: Path) -> None:
    run = project.run(tmp_path, *project.gate_overrides(), "grpo.max_steps=2").path  # a task without documents
    assert "warning: the gate is not followed while training: " in (run / "posttrain.log").read_text()
    assert "gate_sample" not in figures(run)
