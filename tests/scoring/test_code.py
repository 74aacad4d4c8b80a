"""Code of tasks: nobody's without consent, and scores belong to all of it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.cli import answer
from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.digests import digest_of
from posttrain.errors import BadInput
from posttrain.host import consent
from posttrain.scoring import catalogue
from posttrain.scoring.checks import check_tasks
from posttrain.scoring.code import task_digests
from posttrain.scoring.harness.requests import prepare_task
from posttrain.scoring.harness.tasks import load_leaves
from posttrain.scoring.outlook import outlooks
from tests.support.tiny import tiny_tokenizer

PLAIN = {
    "task": "quiz",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "q.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a|trim}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
PROCESS = "process_results: !function scoring.right\n"
TASK = GateTask(role=Role.lift, metric="exact_match", task="task/quiz.yaml")


def write(files: dict[str, str], folder: str = "task", **settings: Any) -> None:
    """Write the plain task with other settings, its questions, and more files; text of YAML ends a task's file."""
    files = {"q.jsonl": '{"q": "1 + 1?", "a": "2"}\n{"q": "2 + 1?", "a": "3"}\n', **files}
    kept = {key: value for key, value in (PLAIN | settings).items() if value is not None}
    files["quiz.yaml"] = yaml.safe_dump(kept) + files.get("quiz.yaml", "")
    for name, text in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def asking() -> Iterator[None]:
    """Take the consent of other tests back."""
    with consent.given_by([]):
        yield


@pytest.fixture(autouse=True)
def config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the user an empty folder of configuration."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "posttrain"


TOUCH = "import pathlib\npathlib.Path('PWNED').touch()\n"
RIGHT = "def right(doc, results):\n    return {'exact_match': 1.0}\n"
BRINGING_CODE: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "a function": ({"quiz.yaml": PROCESS, "scoring.py": TOUCH + RIGHT}, {}),
    "a function of a data set": ({"quiz.yaml": "custom_dataset: !function scoring.right\n", "scoring.py": TOUCH}, {}),
    "a function deep in a list": (
        {"quiz.yaml": "metadata: {a: [{b: !function scoring.right}]}\n", "scoring.py": TOUCH + RIGHT}, {}),
    "a class": ({"quiz.yaml": "class: !function scoring.Task\n", "scoring.py": TOUCH + "class Task: ...\n"}, {}),
    "an included function": (
        {"base.yaml": PROCESS, "quiz.yaml": "include: base.yaml\nprocess_results: null\n", "scoring.py": TOUCH + RIGHT},
        {}),
    "an include outside": (
        {"../other/base.yaml": "num_fewshot: 0\n", "quiz.yaml": "include: ../other/base.yaml\n"}, {}),
    "a metric that is a script": (
        {"pwn/pwn.py": TOUCH}, {"metric_list": [{"metric": "./pwn", "aggregation": "mean", "higher_is_better": True}]}),
    "a metric of evaluate": ({}, {"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}),
    "unsafe code": ({}, {"unsafe_code": True}),
    "a script of a data set": ({"q.py": TOUCH}, {"dataset_path": "task/q.py"}),
    "a builder with code": ({}, {"dataset_path": "iceberg"}),
    "code of a data set": ({}, {"dataset_kwargs": {"data_files": {"test": "q.jsonl"}, "trust_remote_code": True}}),
    "code of generation": ({}, {"generation_kwargs": {"custom_generate": "task", "trust_remote_code": True}}),
    "a prompt file": ({}, {"use_prompt": "p.yaml:x"}),
    "a filter with code": ({}, {"filter_list": [{"name": "x", "filter": [{"function": "custom"}]}]}),
}  # fmt: skip


@pytest.mark.usefixtures("asking")
@pytest.mark.parametrize("kind", BRINGING_CODE)
def test_code_needs_consent_before_any_of_it_runs(kind: str) -> None:
    files, settings = BRINGING_CODE[kind]
    write(files, **settings)
    (problem,) = [found for found in check_tasks({"quiz": TASK}) if "nobody has allowed" in found.what]
    assert consent.FLAG in problem.fix
    with pytest.raises(BadInput, match="nobody has allowed"):
        load_leaves("quiz", TASK)
    assert not Path("PWNED").exists()


@pytest.mark.usefixtures("asking")
def test_data_and_jinja_need_no_consent() -> None:
    more = "fewshot_config: {sampler: first_n}\ndescription: \"{{ 'a' * 3 }}\"\nfilter_list: [{name: x, filter: ["
    write({"base.yaml": "num_fewshot: 0\n", "quiz.yaml": f"include: base.yaml\n{more}{{function: take_first}}]}}]\n"})
    assert check_tasks({"quiz": TASK}) == []
    assert len(load_leaves("quiz", TASK)) == 1


@pytest.mark.usefixtures("asking")
def test_the_line_of_the_message_allows_the_files_until_one_of_them_changes(config_folder: Path) -> None:
    write({"quiz.yaml": PROCESS, "scoring.py": "from helpers import *\n" + RIGHT, "helpers.py": "x = 1\n"})
    (problem,) = check_tasks({"quiz": TASK})
    assert os.system(problem.fix.splitlines()[-1]) == 0
    assert config_folder.joinpath("trusted_tasks").exists()
    assert check_tasks({"quiz": TASK}) == []
    Path("task/helpers.py").write_text("x = 2\n")
    assert len(check_tasks({"quiz": TASK})) == 1


def test_a_recipe_cannot_allow_what_the_command_line_can(capsys: pytest.CaptureFixture[str]) -> None:
    write({"quiz.yaml": PROCESS, "scoring.py": TOUCH + RIGHT})
    words = ["gate", "adapter=nowhere", "gate=none", "gate.enabled=true", "+gate.tasks.quiz.task=task/quiz.yaml"]
    words += ["+gate.tasks.quiz.role=lift", "+gate.tasks.quiz.metric=exact_match"]
    assert answer(words) == 2
    assert "nobody has allowed" in capsys.readouterr().err
    assert answer([*words, "+gate.tasks.quiz.trust_tasks=true"]) == 2
    assert "unknown key 'trust_tasks'" in capsys.readouterr().err
    assert answer([*words, consent.FLAG]) == 2
    assert "nobody has allowed" not in capsys.readouterr().err
    with consent.given_by([]):
        assert len(check_tasks({"quiz": TASK})) == 1


@pytest.mark.parametrize(
    ("words", "line", "allowed"),
    [
        ([], "", False),
        ([consent.FLAG], "", True),
        (["sft.gate.tasks.code.run_code=true"], "", True),
        (["+gate.tasks.code.run_code=True"], "", True),
        (["gate.tasks.other.run_code=true"], "", False),
        ([], "run_code mbpp_instruct\n", True),
        ([], "run_code humaneval\n", False),
    ],
)
def test_programs_of_the_model_need_the_users_permission(
    words: list[str], line: str, allowed: bool, config_folder: Path
) -> None:
    config_folder.mkdir(parents=True)
    (config_folder / "trusted_tasks").write_text(line)
    task = GateTask(role=Role.lift, metric="pass_at_1", task="mbpp_instruct", filter="extract_code", run_code=True)
    with consent.given_by(words):
        problems = check_tasks({"code": task})
    assert ([] if allowed else ["tasks.code.run_code"]) == [problem.where for problem in problems]


HELPED = {"quiz.yaml": PROCESS, "scoring.py": "import helpers\n" + RIGHT, "helpers.py": "x = 1\n"}
PATHED = "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\n"
WITH_HELPERS: dict[str, tuple[dict[str, str], str]] = {
    "the module itself": ({"quiz.yaml": PROCESS, "scoring.py": RIGHT}, "scoring.py"),
    "a helper": ({**HELPED, "scoring.py": PATHED + "import helpers\n" + RIGHT}, "helpers.py"),
    "a helper's helper": (
        {**HELPED, "scoring.py": PATHED + "import helpers\n" + RIGHT, "helpers.py": "from deep.er import x\n",
         "deep/er.py": "x = 1\n", "deep/__init__.py": ""}, "deep/er.py"),
    "a helper in a folder of its own": (
        {**HELPED, "lib/extra.py": "x = 1\n", "scoring.py": "import sys, pathlib\n"
         "sys.path.insert(0, str(pathlib.Path(__file__).parent / 'lib'))\nimport extra\n" + RIGHT}, "lib/extra.py"),
    "a function imported from a helper": (
        {**HELPED, "scoring.py": PATHED + "from helpers import right\n", "helpers.py": RIGHT}, "helpers.py"),
    "the module that imports the function": (
        {**HELPED, "scoring.py": PATHED + "from helpers import right\n", "helpers.py": RIGHT}, "scoring.py"),
    "a file that is read": (
        {**HELPED, "words.txt": "a", "scoring.py": "import pathlib\n"
         "WORDS = pathlib.Path(__file__).with_name('words.txt').read_text()\n" + RIGHT}, "words.txt"),
    "a folder that is read": (
        {**HELPED, "words/a.txt": "a", "scoring.py": "import pathlib\n"
         "WORDS = list((pathlib.Path(__file__).parent / 'words').iterdir())\n" + RIGHT}, "words/a.txt"),
    "a module imported by name": (
        {**HELPED, "scoring.py": PATHED + "import importlib\nimportlib.import_module('helpers')\n" + RIGHT},
        "helpers.py"),
    "a file that the settings name": (
        {**HELPED, "quiz.yaml": PROCESS + "metadata: {words: words.txt}\n", "words.txt": "a", "scoring.py": RIGHT},
        "words.txt"),
    "the function of an included file": (
        {"base.yaml": "include: more.yaml\n", "more.yaml": PROCESS, "quiz.yaml": "include: base.yaml\n",
         "scoring.py": RIGHT}, "scoring.py"),
    "a metric": (
        {"quiz.yaml": "metric_list: [{metric: !function scoring.exact_match, aggregation: mean, "
         "higher_is_better: true}]\n", "scoring.py": "def exact_match(items):\n    return 1.0\n"}, "scoring.py"),
    "a class": (
        {"quiz.yaml": "class: !function scoring.Quiz\n", "scoring.py": PATHED +
         "from lm_eval.api.task import ConfigurableTask\nimport helpers\nclass Quiz(ConfigurableTask):\n"
         "    def __init__(self, config=None):\n        super().__init__(config={k: v for k, v in config.items() "
         "if k != 'class'})\n", "helpers.py": "x = 1\n"}, "helpers.py"),
}  # fmt: skip


def settings_of(task: GateTask = TASK) -> str:
    return digest_of(prepare_task("quiz", task, tiny_tokenizer(), 0).settings)


@pytest.mark.parametrize("kind", WITH_HELPERS)
def test_scores_and_verdicts_depend_on_every_file_behind_a_task(kind: str) -> None:
    files, changed = WITH_HELPERS[kind]
    own = {"metric_list": None} if kind == "a metric" else {}
    write({"unrelated.py": "x = 1\n", **files}, **own)
    scores, verdicts = settings_of(), task_digests("task/quiz.yaml", None)
    Path("task/unrelated.py").write_text("x = 2\n")
    shutil.copytree("task", "moved")
    moved = GateTask(role=Role.lift, metric="exact_match", task="moved/quiz.yaml")
    assert settings_of() == settings_of(moved) == scores
    assert task_digests("task/quiz.yaml", None) == verdicts
    path = Path("task", changed)
    path.write_text(path.read_text() + ("\n# edited\n" if path.suffix == ".py" else "b"))
    assert settings_of() != scores
    assert task_digests("task/quiz.yaml", None) != verdicts


def test_equal_names_in_two_folders_are_two_files() -> None:
    """Both a file included from another folder, and the helper that each of two tasks imports under one name."""
    for folder, score in (("task", 0.0), ("other", 1.0)):
        helped = PATHED + "import helpers\ndef right(doc, results):\n    return {'exact_match': helpers.x}\n"
        write({"quiz.yaml": PROCESS, "scoring.py": helped, "helpers.py": f"x = {score}\n"}, folder)
    scores = []
    for folder in ("task", "other", "task"):
        (leaf,) = load_leaves("quiz", GateTask(role=Role.lift, metric="exact_match", task=f"{folder}/quiz.yaml"))
        scores.append(leaf.process_results({}, [""])["exact_match"])
    assert scores == [0.0, 1.0, 0.0]
    write({"quiz.yaml": "include: ../other/quiz.yaml\n" + PROCESS, "scoring.py": RIGHT})
    before = task_digests("task/quiz.yaml", None)
    Path("other/scoring.py").write_text(RIGHT + "# edited\n")
    assert task_digests("task/quiz.yaml", None) != before


def test_an_edited_helper_is_imported_again() -> None:
    scoring = PATHED + "import helpers\ndef right(doc, results):\n    return {'exact_match': helpers.x}\n"
    write({"quiz.yaml": PROCESS, "scoring.py": scoring, "helpers.py": "x = 0.0\n"})
    assert load_leaves("quiz", TASK)[0].process_results({}, [""]) == {"exact_match": 0.0}
    Path("task/helpers.py").write_text("x = 1.0  # another size than before, as Python's own cache of code demands\n")
    assert load_leaves("quiz", TASK)[0].process_results({}, [""]) == {"exact_match": 1.0}


HOSTILE = {
    "python": "task: !!python/object/apply:os.system [touch PWNED]\n",
    "a tuple": "task: !!python/tuple [1]\n",
    "bomb": "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in pairwise("abcdefghi")),
    "merges": "a: &a {x: 1}\n" + "".join(
        f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 10)}]}}\n" for old, new in pairwise("abcdefghi")),
    "an anchor within itself": "task: &a [*a]\n",
    "deep": "task: " + "[" * 5000 + "]" * 5000 + "\n",
    "huge": "task: " + "a" * 3_000_000 + "\n",
    "includes itself": "include: quiz.yaml\n",
    "no settings": "- a\n",
    "not UTF-8": "task: \udcff\n",
    "empty": "",
    "a number as key": "1: 2\n",
    "includes a list of lists": "include: [[a]]\n",
    "kinds": "task: quiz\nmetric_list: [1, a]\ndataset_kwargs: [1]\nfilter_list: {a: 1}\ntest_split: [a]\n",
}  # fmt: skip


@pytest.mark.usefixtures("asking")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_named_at_once(kind: str) -> None:
    write({"quiz.yaml": ""})
    Path("task/quiz.yaml").write_text(HOSTILE[kind], errors="surrogateescape")
    started = time.process_time()
    problems = check_tasks({"quiz": TASK})
    assert problems
    assert all(problem.where.startswith("tasks.quiz") for problem in problems)
    assert time.process_time() - started < 60  # what grows with every level would take hours
    with pytest.raises(BadInput):
        load_leaves("quiz", TASK)
    assert not Path("PWNED").exists()
    if kind == "kinds":
        outlooks(GateConfig(tasks={"quiz": TASK}), {"quiz": TASK})


def test_a_pipe_is_no_task_file() -> None:
    Path("task").mkdir()
    os.mkfifo("task/quiz.yaml")
    assert len(check_tasks({"quiz": TASK})) == 1
    with pytest.raises(ValueError, match="not a regular file"):
        catalogue.read_files(Path("task/quiz.yaml"))
    Path("task/real.yaml").write_text("include: quiz.yaml\ntask: quiz\n")
    (problem,) = check_tasks({"quiz": GateTask(role=Role.lift, metric="exact_match", task="task/real.yaml")})
    assert "not a regular file" in problem.what
