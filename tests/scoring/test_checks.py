"""Problems of a gate's tasks, found in their files before lm_eval is imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.schema import GateTask, Role
from posttrain.errors import Problem
from posttrain.scoring.checks import check_tasks
from posttrain.scoring.harness.tasks import preflight
from tests.support.quizzes import METRICS, gate_task, write_quizzes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quizzes(tmp_path_factory.mktemp("gate"))


def problems_of(task: GateTask, name: str = "quiz") -> list[Problem]:
    return check_tasks({name: task})


def test_sound_tasks_have_no_problems(folder: Path) -> None:
    names = [f"{kind}{shots}" for kind in METRICS for shots in (0, 2)]
    tasks = {name: gate_task(folder, name) for name in names}
    assert check_tasks(tasks) == []
    preflight(tasks)


def test_registered_tasks_are_known() -> None:
    guard = Role.guard
    assert check_tasks({"ifeval": GateTask(role=guard, metric="prompt_level_strict_acc")}) == []
    assert check_tasks({"math": GateTask(role=guard, task="gsm8k", metric="exact_match", filter="strict-match")}) == []
    assert check_tasks({"mmlu": GateTask(role=guard, metric="acc")}) == []
    assert check_tasks({"mmlu_anatomy": GateTask(role=guard, metric="acc")}) == []


@pytest.mark.parametrize(
    ("settings", "where", "what", "fix"),
    [
        ({"metric": "exact_mach"}, "metric", "no metric exact_mach", "Did you mean exact_match?"),
        ({"filter": None}, "filter", "several filters", "first, whole"),
        ({"filter": "firts"}, "filter", "no filter firts", "Did you mean first?"),
        ({"limit": 0}, "limit", "limit is 0", "at least 1"),
        ({"num_fewshot": -1}, "num_fewshot", "num_fewshot is -1", "at least 0"),
    ],
)
def test_a_wrong_setting_names_the_options(
    folder: Path, settings: dict[str, Any], where: str, what: str, fix: str
) -> None:
    (problem,) = problems_of(gate_task(folder, "generate0", **settings))
    assert problem.where == f"tasks.quiz.{where}"
    assert what in problem.what
    assert fix in problem.fix


def test_a_missing_file_names_its_nearest_sibling(folder: Path) -> None:
    (problem,) = problems_of(GateTask(role=Role.lift, metric="acc", task=str(folder / "chose0.yaml")))
    assert "there is no file" in problem.what
    assert "choose0.yaml" in problem.fix


@pytest.mark.parametrize("name", ["documents.csv", "documents.txt"])
def test_documents_in_another_kind_of_file_are_rejected(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("question,answer")
    (problem,) = problems_of(gate_task(folder, "generate0", data=str(tmp_path / name)))
    assert problem.where == "tasks.quiz.data"
    assert name in problem.what
    assert problem.fix == "Known: .json, .jsonl, .parquet"


def test_an_unknown_name_names_the_nearest() -> None:
    (problem,) = problems_of(GateTask(role=Role.lift, metric="exact_match"), name="gsm8kk")
    assert "Did you mean gsm8k?" in problem.fix


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("task: [", "cannot be read"),
        ("- 1", "cannot be read"),
        ("include: nowhere.yaml", "cannot be read"),
        ("include: broken.yaml", "cannot be read"),
        ("dataset_path: json", "names no task"),
        ("task: quiz\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}", "does not exist"),
        ("task: quiz\nmetric_list: [{metric: acc, aggregation: median}]", "not a mean over documents"),
        ("task: quiz\nmetric_list: [{metric: acc, aggregation: !function scoring.pool}]", "not a mean over documents"),
    ],
)
def test_a_broken_file_is_a_problem(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    (problem,) = problems_of(GateTask(role=Role.lift, metric="acc", task=str(path)))
    assert complaint in problem.what


def test_includes_and_functions_are_followed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "derived.yaml"
    path.write_text(f"include: {folder / 'likelihood0.yaml'}\ntask: derived\n")
    task = GateTask(role=Role.guard, metric="surprise", task=str(path))
    assert problems_of(task) == []
    preflight({"quiz": task})
    assert len(problems_of(replace(task, metric="acc2"))) == 1
