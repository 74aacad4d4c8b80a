"""Every shipped gate composes and plans; those that need no hub run on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli
from posttrain.commands.gate import read_settings
from posttrain.config.compose import compose
from posttrain.config.paths import conf_folders
from posttrain.errors import BadInput, Problem
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.plan import make_plan
from posttrain.scoring.harness.tasks import load_leaves
from posttrain.scoring.outlook import outlooks
from posttrain.scoring.scorecard import read_scorecard
from tests.support.adapters import write_adapters

FOLDERS = conf_folders([folder for folders in plugins.load().folders.values() for folder in folders])
GATES = sorted(path.stem for folder in FOLDERS for path in folder.glob("gate/*.yaml") if path.stem != "none")
GIVEN: dict[str, list[str]] = {
    "code": ["tasks.mbpp_instruct.run_code=true"],
    "dpo_default": ["tasks.preferences.data=rows.jsonl"],
    "local": ["tasks.mine.data=rows.jsonl"],
    "perplexity": ["tasks.responses.data=rows.jsonl"],
}
"""Settings that a gate leaves to its user."""
EVALUATED = {
    "gsm8k_form": ["gate_data=rows.jsonl"],
    "preferences": ["+gate_data.preferences=rows.jsonl"],
    "responses": ["+gate_data.responses=rows.jsonl", "+gate_data.preferences=rows.jsonl"],
    "texts": ["+gate_data.texts=rows.jsonl", "+gate_data.responses=rows.jsonl"],
}
"""Settings that a gate takes from the recipe."""


@pytest.fixture(autouse=True)
def rows() -> None:
    Path("rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')


@pytest.mark.parametrize("name", GATES)
def test_a_shipped_gate_composes_and_plans(host: Host, name: str) -> None:
    evaluated = EVALUATED.get(name, [])
    evaluated = ["gate_data={}", *evaluated] if any(word.startswith("+") for word in evaluated) else evaluated
    words = [f"gate.{setting}" for setting in GIVEN.get(name, [])]
    _, settings, tasks, wrong = read_settings(host, ["adapter=x", f"gate={name}", *words, *evaluated])
    assert not wrong
    assert tasks
    assert settings.gate.enabled
    recipe = ["recipe=quickstart", "stages=[sft]", f"gate@sft.gate={name}"]
    given = [f"sft.gate.{setting}" for setting in GIVEN.get(name, [])]
    plan = make_plan(compose(host, [*recipe, *given, *evaluated]), host)
    assert plan.steps[0].tasks == tasks


@pytest.mark.parametrize("name", ["sft_default", "dpo_default", "safety_default", "math", "code"])
def test_the_plan_knows_the_power_of_gates_on_public_tasks(host: Host, name: str) -> None:
    words = [f"gate.{setting}" for setting in GIVEN.get(name, [])]
    _, settings, tasks, _ = read_settings(host, ["adapter=x", f"gate={name}", *words])
    found = {each.name: each for each in outlooks(settings.gate, tasks)}
    graded = {"preferences", "truthfulqa_mc2"}  # one is the user's own file, the other is no share of right answers
    assert all(found[task].chances for task in tasks if task not in graded)
    assert min(found[task].documents or 0 for task in tasks if task not in graded) >= 100


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_gate_leaves_to_its_user_is_asked_for(host: Host, name: str) -> None:
    (setting,) = GIVEN[name]
    assert f"gate.{setting.partition('=')[0]}" in {problem.where for problem in problems(host, name)}


def problems(host: Host, name: str) -> list[Problem]:
    """Return the problems of a gate as it ships."""
    try:
        return read_settings(host, ["adapter=x", f"gate={name}"])[-1]
    except BadInput as error:
        return error.problems


def test_code_is_run_only_where_that_is_allowed(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "run.yaml").write_text(
        "task: run\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "unsafe_code: true\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    gate = ["adapter=x", "gate=local", "gate.tasks.mine.data=rows.jsonl", "gate.tasks.mine.metric=exact_match"]
    gate.append(f"gate.tasks.mine.task={tmp_path / 'run.yaml'}")
    *_, wrong = read_settings(host, gate)
    assert [problem.what for problem in wrong] == ["the task runs programs that the model writes"]
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    _, _, tasks, _ = read_settings(host, [*gate, "gate.tasks.mine.run_code=true"])
    assert len(load_leaves("mine", tasks["mine"])) == 1
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


# --- On a tiny model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("shipped"))


def gate(material: Path, name: str, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gate", f"adapter={material / 'good'}", f"gate={name}", *words])
    return int(str(ended.value.code))


def write(name: str, found: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in found))


def test_own_questions_and_held_out_responses_decide(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [{"question": f"number {index}?", "answer": "-"} for index in range(12)]
    write("rows.jsonl", questions)
    assert gate(material, "local", "gate.tasks.mine.data=rows.jsonl", "gate.batch_size=16") in (3, 4)
    (card,) = Path("runs/gates").glob("local-*/scorecard.jsonl")
    said = {row.doc_id: row.response for row in read_scorecard(card) if row.system == "candidate"}
    for index, question in enumerate(questions):
        question["answer"] = said[index].strip()
    questions = [question for question in questions if question["answer"]]
    assert len(questions) > 3
    write("rows.jsonl", questions)
    assert gate(material, "local", "gate.tasks.mine.data=rows.jsonl", "gate.batch_size=16") == 0
    assert f"mine (lift, n {len(questions)})" in capsys.readouterr().out
    write("held_out.jsonl", [{"prompt": each["question"], "completion": each["answer"]} for each in questions])
    assert gate(material, "perplexity", "gate.tasks.responses.data=held_out.jsonl") == 0
    assert f"responses (lift, n {len(questions)})" in capsys.readouterr().out
