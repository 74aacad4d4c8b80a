"""The stage, by the suite that third parties use; what its metrics and its trail say; when it stops."""

from __future__ import annotations

import json
import os
import re
import signal
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain import BadInput, Interrupted
from posttrain.testing import Project, StageConformance
from posttrain.testing.conformance import AtStep

QUICK: dict[str, Any] = {
    "lr": 1e-2,
    "epochs": 2,
    "k": 4,
    "temperature": 3.0,
    "max_tokens": 12,
    "reward": {"regex": 1.0, "ended": 0.5},
    "per_device_batch_size": 2,
    "gradient_accumulation": 2,
    "checkpoint_steps": 1,
    "gradient_checkpointing": False,
}
WORDS = ("red", "blue", "green", "clay", "ash", "elm", "ivy", "oak")
QUESTIONS = [{"question": f"a {word}", "answer": "[a-p]", "match": "regex"} for word in WORDS]


class TestGRPO(StageConformance):
    kind = "grpo"
    settings = {**QUICK, "eval_share": 0.25, "eval_steps": 1, "max_steps": 4}
    records = QUESTIONS
    rejected = ([{"question": "a red"}], [{"question": "a red", "answer": "(", "match": "exact"}])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("grpo")
    return Project(folder=folder, kind="grpo", settings=QUICK, records=QUESTIONS).write()


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_divergence_from_the_parent_is_exactly_zero_before_the_first_step(project: Project, tmp_path: Path) -> None:
    run = project.run(tmp_path, "grpo.beta=0.1", "grpo.max_steps=3").path
    first, *later = steps(run)
    assert first["kl"] == 0.0
    assert all(step["kl"] > 0 for step in later)


def test_every_answer_of_every_step_stays_with_its_reward(project: Project, tmp_path: Path) -> None:
    run = project.run(tmp_path, "grpo.max_steps=3").path
    for step in steps(run):
        path = run / "stages" / "grpo" / "answers" / f"step-{step['step']:08d}.jsonl"
        answers = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(answers) == step["answers"] == 16
        assert step["reward"] == pytest.approx(sum(each["reward"] for each in answers) / 16)
        assert step["cut"] == sum(not each["ended"] for each in answers) / 16
        assert all(each["reward"] == each["rewards"]["regex"] + 0.5 * each["rewards"]["ended"] for each in answers)
    figures = json.loads((run / "stages" / "grpo" / "artifact" / "manifest.json").read_text())["metrics"]
    assert (figures["sampled_answers"], figures["questions"]) == (48, 8)
    ends = [step["reward"] for step in steps(run)]
    assert (figures["reward_first"], figures["reward_last"]) == (pytest.approx(ends[0]), pytest.approx(ends[-1]))


def test_greedy_answers_to_questions_set_aside_are_scored_and_change_nothing(project: Project, tmp_path: Path) -> None:
    words = ("ice", "sea", "fog")
    asked = [{"question": f"a {word}", "answer": "[a-p]", "match": "regex"} for word in words]
    path = project.write_records(asked, "aside.jsonl")
    plain = project.run(tmp_path / "plain", "grpo.max_steps=3").path
    run = project.run(tmp_path / "told", "grpo.max_steps=3", f"grpo.eval_data='{path}'", "grpo.eval_steps=2").path
    weights = "stages/grpo/artifact/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (plain / weights).read_bytes()
    told = {step["step"]: step for step in steps(run)}
    assert [step for step, each in told.items() if "eval_reward" in each] == [0, 2, 3]
    changing = {"tokens_per_second", "mfu"}
    for step in steps(plain):
        assert {name: told[step["step"]][name] for name in step if name not in changing} == {
            name: value for name, value in step.items() if name not in changing
        }
    for step in (0, 2, 3):
        answers = run / "stages" / "grpo" / "answers" / f"eval-{step:08d}.jsonl"
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
        assert [line["question"] for line in lines] == [f"a {word}" for word in words]
        assert told[step]["eval_reward"] == pytest.approx(sum(line["reward"] for line in lines) / len(words))
        right = [line["ended"] and re.search("[a-p]", line["answer"]) is not None for line in lines]
        assert [line["right"] for line in lines] == right
        assert told[step]["eval_right"] == sum(right) / len(words)
        assert told[step]["eval_cut"] == sum(not line["ended"] for line in lines) / len(words)
    figures = json.loads((run / "stages" / "grpo" / "artifact" / "manifest.json").read_text())["metrics"]
    assert figures["eval_questions"] == len(words)
    assert (figures["eval_reward_first"], figures["eval_reward"]) == (told[0]["eval_reward"], told[3]["eval_reward"])
    assert (figures["eval_right_first"], figures["eval_right"]) == (told[0]["eval_right"], told[3]["eval_right"])


def test_a_share_of_the_questions_is_set_aside_and_never_trained(project: Project, tmp_path: Path) -> None:
    run = project.run(tmp_path, "grpo.eval_share=0.25", "grpo.epochs=2").path
    answers = run / "stages" / "grpo" / "answers"
    trained, measured = (
        {json.loads(line)["question"] for path in answers.glob(kind) for line in path.read_text().splitlines()}
        for kind in ("step-*.jsonl", "eval-*.jsonl")
    )
    assert (len(trained), len(measured), trained & measured) == (6, 2, set())
    assert len(list(answers.glob("eval-*.jsonl"))) == 3  # before training, and after each pass


def test_a_question_to_set_aside_that_is_trained_is_rejected(project: Project, tmp_path: Path) -> None:
    path = project.write_records([{"question": "A  Red", "answer": "x", "match": "regex"}], "both.jsonl")
    with pytest.raises(BadInput, match=r"both.jsonl:1: it is set aside by eval_data, and trained as .*records.jsonl:1"):
        project.run(tmp_path, f"grpo.eval_data='{path}'")


def test_it_stops_where_nothing_is_learnt(project: Project, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"in 2 steps no question had answers of different rewards \(mean 0.000\)"):
        project.run(tmp_path, "grpo.reward=exact", "grpo.idle_steps=2")


def test_a_short_training_that_learns_nothing_says_so(project: Project, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"in 3 steps no question had answers of different rewards \(mean 0.000\)"):
        project.run(tmp_path, "grpo.reward=exact", "grpo.max_steps=3")


def test_it_stops_at_the_same_step_when_it_was_interrupted_in_between(project: Project, tmp_path: Path) -> None:
    idle = ["grpo.reward=exact", "grpo.idle_steps=3"]
    with pytest.raises(Interrupted):
        project.run(tmp_path, *idle, also=[AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    told = AtStep(0, int)
    with pytest.raises(BadInput, match="in 3 steps no question had answers of different rewards"):
        project.run(tmp_path, *idle, also=[told])
    assert told.seen == [], "the third step without a difference is the first after resuming"


def test_full_weights_are_trained_as_an_adapter_is(tmp_path: Path) -> None:
    folder, change = tmp_path / "project", ["grpo.beta=0.1", "grpo.updates=2", "grpo.max_steps=4"]
    folder.mkdir()
    settings = {**QUICK, "max_tokens": 40, "reward": "ended"}  # random weights rarely answer well, but some answers end
    project = Project(folder=folder, kind="grpo", settings=settings, records=QUESTIONS, full=True).write()
    whole = project.run(tmp_path / "whole", *change).path
    told = steps(whole)
    assert told[0]["kl"] == told[0]["clipped"] == 0.0
    assert all(step["kl"] > 0 for step in told[1:])
    assert max(step["clipped"] for step in told) > 0, "the second update is off the policy that wrote the answers"
    assert [step["reward"] for step in told] == [told[0]["reward"]] * 2 + [told[2]["reward"]] * 2
    with pytest.raises(Interrupted):
        project.run(tmp_path / "resumed", *change, also=[AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    resumed = project.run(tmp_path / "resumed", *change).path
    weights = "stages/grpo/artifact/model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()
    before = load_file(folder / "sft" / "model.safetensors")
    assert all(not torch.equal(each, before[name]) for name, each in load_file(whole / weights).items())


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("grpo.k=1", "k: must be at least 2"),
        ("grpo.loss_type=dapoo", "Did you mean dapo"),
        ("grpo.scale_rewards=all", "no scale is called 'all'"),
        ("grpo.eval_steps=1", "measures nothing without eval records"),
        ("grpo.reward=exakt", "no reward is called 'exakt'"),
        ("grpo.sequence_length=20", "exceed 20"),
        ("grpo.max_tokens=600", "exceed"),
    ],
)
def test_unusable_settings_are_rejected(project: Project, tmp_path: Path, override: str, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        project.run(tmp_path, override)


def test_listing_imports_no_torch() -> None:
    assert EntryPoint(name="grpo", value="posttrain_grpo", group="posttrain").load().KIND == "grpo"
