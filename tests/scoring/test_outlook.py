"""A gate's chances in the plan, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.gate.statistics import paired_documents, paired_power
from posttrain.scoring import plugin
from posttrain.scoring.outlook import Outlook, outlooks
from tests.support.gates import GUARD, LIFT

TASK = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl, train: examples.jsonl}}
test_split: test
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: %s}
  - {metric: perplexity, aggregation: mean}
"""


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """A task file with 300 documents and 7 examples."""
    (tmp_path / "questions.jsonl").write_text("{}\n" * 300)
    (tmp_path / "examples.jsonl").write_text("{}\n" * 7)
    path = tmp_path / "quiz.yaml"
    path.write_text(TASK % "true")
    return path


def outlook(path: Path, task: GateTask = LIFT, **gate: float) -> Outlook:
    return outlooks(GateConfig(**gate), {"quiz": replace(task, task=str(path))})[0]


def test_documents_are_those_of_the_split_that_is_scored(quiz: Path, tmp_path: Path) -> None:
    assert outlook(quiz).documents == 300
    assert outlook(quiz, replace(LIFT, limit=40)).documents == 40
    assert outlook(quiz, replace(LIFT, limit=4000)).documents == 300
    (tmp_path / "own.jsonl").write_text("{}\n" * 12)
    assert outlook(quiz, replace(LIFT, data=str(tmp_path / "own.jsonl"))).documents == 12


@pytest.mark.parametrize("settings", ["process_docs: !function own.half\n", "dataset_kwargs: {}\n"])
def test_documents_that_only_loading_tells_are_not_guessed(quiz: Path, settings: str) -> None:
    lines = [line for line in quiz.read_text().splitlines() if not settings.startswith(line.split(":")[0])]
    quiz.write_text("\n".join(lines) + "\n" + settings)
    assert outlook(quiz).documents is None
    assert outlook(quiz).chances == ()
    assert outlook(quiz).needed == paired_documents(0.1, 0.05, 0.0, 0.95)
    assert outlook(quiz, replace(LIFT, limit=40)).documents == 40


def test_chances_are_the_power_of_the_test(quiz: Path) -> None:
    assert outlook(quiz).chances == tuple(paired_power(300, share, 0.05, 0.0, 0.95) for share in (0.1, 0.2))
    guard = replace(GUARD, max_drop=0.03)
    assert outlook(quiz, guard).chances == tuple(paired_power(300, share, 0.0, -0.03, 0.95) for share in (0.1, 0.2))
    assert outlook(quiz, replace(LIFT, min_lift=0.5)).chances[0] == paired_power(300, 0.1, 0.55, 0.5, 0.95)


@pytest.mark.parametrize("data", ["own.jsonl", "own.json", "own.parquet"])
def test_own_questions_have_chances_whatever_file_they_are_in(data: str) -> None:
    questions = [{"question": str(number), "answer": "a"} for number in range(90)]
    Path("own.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    Path("own.json").write_text(json.dumps(questions))
    parquet.write_table(pyarrow.Table.from_pylist(questions), "own.parquet")
    (folder,) = plugin.register_eval_tasks()
    found = outlook(folder / "own_questions.yaml", GateTask(role=Role.lift, metric="right", data=data))
    assert found.documents == 90
    assert found.chances == tuple(paired_power(90, share, 0.05, 0.0, 0.95) for share in (0.1, 0.2))


def test_files_that_only_lm_eval_can_read_are_not_counted(quiz: Path) -> None:
    quiz.write_text(quiz.read_text().replace("questions.jsonl", "questions.csv"))
    (quiz.parent / "questions.csv").write_text("a,b\n1,2\n")
    assert outlook(quiz).documents is None


def test_several_lifts_have_the_chances_that_holms_correction_leaves(quiz: Path) -> None:
    tasks = {name: replace(LIFT, task=str(quiz)) for name in ("a", "b")}
    assert outlooks(GateConfig(), tasks)[0].chances[0] == paired_power(300, 0.1, 0.05, 0.0, 0.975)


@pytest.mark.parametrize(
    ("task", "limit", "hopeless"),
    [
        (LIFT, 20, True),
        (LIFT, 300, False),
        (GUARD, 100, True),
        (replace(GUARD, max_drop=0.05), 300, False),
        (GateTask(role=Role.limit, metric="acc", threshold=0.9), 20, True),  # 0.05 ** (1 / 20) = 0.86
        (GateTask(role=Role.limit, metric="acc", threshold=0.9), 300, False),
    ],
)
def test_a_gate_that_can_hardly_pass_is_hopeless(quiz: Path, task: GateTask, limit: int, hopeless: bool) -> None:
    found = outlook(quiz, replace(task, limit=limit))
    assert found.hopeless is hopeless
    assert (found.needed > limit) or not hopeless


def test_a_limit_on_what_should_be_rare_is_turned_around(quiz: Path) -> None:
    limit = GateTask(role=Role.limit, metric="acc", threshold=0.1)
    assert outlook(quiz, limit).chances != outlook(quiz, replace(limit, threshold=0.9)).chances
    quiz.write_text(TASK % "false")
    assert outlook(quiz, limit).chances == outlook(quiz, replace(limit, threshold=0.9, higher_is_better=True)).chances
    assert outlook(quiz, replace(limit, higher_is_better=True)).chances == pytest.approx((1.0,), abs=0.4)


def test_scores_that_are_not_right_or_wrong_have_no_chances(quiz: Path) -> None:
    assert outlook(quiz, replace(LIFT, metric="perplexity")) == Outlook(name="quiz", role=Role.lift, documents=300)


def test_all_guards_together_are_hopeless_before_each_of_them_is(quiz: Path) -> None:
    tasks = {f"guard{number}": replace(GUARD, task=str(quiz), max_drop=0.035) for number in range(4)}
    found = outlooks(GateConfig(), tasks)
    assert [each.hopeless for each in found] == [False] * 4 + [True]
    assert found[-1].chances[0] == pytest.approx(found[0].chances[0] ** 4)


def test_pooled_guards_have_the_chances_of_the_pool(quiz: Path) -> None:
    tasks = {f"guard{number}": replace(GUARD, task=str(quiz), max_drop=None) for number in range(4)}
    found = outlooks(GateConfig(pooled_max_drop=0.02), tasks)
    assert not any(each.hopeless for each in found)
    assert found[-1].documents == 1200
    # like one guard of four times the documents
    assert found[-1].chances[0] == pytest.approx(paired_power(1200, 0.1, 0.0, -0.02, 0.95), abs=0.03)


def test_the_plan_states_power_and_warns(quiz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.commands import plan

    gate = f"+sft.gate.tasks.quiz={{task: {quiz}, role: guard, metric: acc, limit: 100}}"
    assert plan.main(["recipe=quickstart", "stages=[sft]", gate]) == 0
    text = capsys.readouterr().out
    assert "guard quiz acc: lower bound > -0.020, 100 documents; an unchanged model passes with 15% or 11%" in text
    assert "warning: quiz is hopeless: an unchanged model passes with 15% at best; about 1,579 documents" in text
    assert "lift towns_facts exact_match: lower bound > +0.500, 400 documents; a lift 5 points better passes" in text
    assert plan.main(["recipe=quickstart", "stages=[sft]", gate, "--json"]) == 0
    power = json.loads(capsys.readouterr().out)["stages"][0]["power"]
    assert power["quiz"]["documents"] == 100
    assert power["quiz"]["chances"][0] == pytest.approx(0.15, abs=0.01)
