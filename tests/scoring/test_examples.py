"""Few-shot examples: never the document that is asked, however a task gives its documents."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from posttrain.config.schema import GateTask, Role
from posttrain.errors import BadInput
from posttrain.scoring import plugin
from posttrain.scoring.harness.requests import prepare_task
from posttrain.scoring.harness.tasks import preflight
from posttrain.scoring.questions import Question
from tests.support.tiny import tiny_tokenizer

SEED, SHOTS, COUNT = 7, 8, 24
FUNCTIONS = """
import json

def samples():
    return [json.loads(line) for line in open("data.jsonl")]

def numbered(documents):
    return documents.map(lambda row, number: {"number": number}, with_indices=True)

def shout(doc):
    return doc["question"].upper() + "  ?"

def plain(doc):
    return doc["question"] + " ?"
"""


def row(index: int, **more: Any) -> dict[str, Any]:
    names = [f"value-{index}", f"wrong-{index}"]
    return {"question": f"question-{index}", "answer": f"value-{index}", "choices": names, "label": 0, **more}


def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> None:
    Path(name).write_text("".join(f"{json.dumps(each)}\n" for each in rows))


ROWS = [row(index) for index in range(COUNT)]
SPLITS = {"test": "data.jsonl", "train": "train.jsonl", "validation": "data.jsonl"}
GENERATE = {
    "task": "shots", "dataset_path": "json", "output_type": "generate_until", "num_fewshot": SHOTS,
    "doc_to_text": "{{question}} ?", "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["\n"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
CHOOSE = {
    **GENERATE, "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
TEST = {"test_split": "test"}
WAYS: dict[str, dict[str, Any]] = {
    "test split only": TEST,
    "validation split only": {"validation_split": "validation"},
    "the few-shot split is the test split": {**TEST, "fewshot_split": "test"},
    "the few-shot split is the scored validation split": {
        "validation_split": "validation", "fewshot_split": "validation",
    },
    "a training split with some of the documents": {**TEST, "training_split": "train"},
    "a few-shot split with some of the documents": {**TEST, "fewshot_split": "train"},
    "the first examples": {**TEST, "fewshot_config": {"sampler": "first_n"}},
    "the first of the same split": {**TEST, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}},
    "samples in the file": {**TEST, "fewshot_config": {"samples": ROWS}},
    "samples by a function": {**TEST, "fewshot_config": {"samples": "!function scoring.samples"}},
    "examples with a field more": {
        **TEST, "fewshot_split": "test", "fewshot_config": {"process_docs": "!function scoring.numbered"},
    },
    "examples that explain": {**TEST, "fewshot_config": {"doc_to_target": "It is {{answer}}, because."}},
    "functions": {
        **TEST, "doc_to_text": "!function scoring.plain", "fewshot_config": {"doc_to_text": "!function scoring.shout"},
    },
    "documents of the gate": {**TEST, "training_split": "train", "data": True},
    "documents of the gate for a few-shot split": {**TEST, "fewshot_split": "train", "data": True},
}  # fmt: skip
TRAIN = [*ROWS[:4], *(row(index) for index in range(100, 108))]


def write_task(settings: dict[str, Any], name: str = "shots.yaml") -> None:
    splits = [value for key, value in settings.items() if key.endswith("_split")]
    files = {split: SPLITS[split] for split in splits}
    text = yaml.safe_dump({**settings, "dataset_kwargs": {"data_files": files}})
    Path(name).write_text(re.sub(r"'(!function [\w.]+)'", r"\1", text))
    Path("scoring.py").write_text(FUNCTIONS)


def prompts(settings: dict[str, Any], chat: bool | None = None, **changed: Any) -> list[str]:
    """Return the prompt of every document, as a gate asks it."""
    return [question.prompt for question in questions(settings, chat, **changed)]


def questions(settings: dict[str, Any], chat: bool | None = None, **changed: Any) -> Sequence[Question]:
    """Return every document as a gate asks it."""
    data = "data.jsonl" if settings.pop("data", None) else None
    write_task(settings)
    metric = settings["metric_list"][0]["metric"]
    task = GateTask(task="shots.yaml", role=Role.lift, metric=metric, data=data, chat=chat, **changed)
    preflight({"mine": task})
    return prepare_task("mine", task, tiny_tokenizer(), SEED).questions


def examples(prompt: str) -> list[str]:
    """Return the numbers of the answered questions of a prompt, and of the one that is asked."""
    return re.findall(r"question-(\d+)", prompt.casefold())


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", [GENERATE, CHOOSE], ids=["generate", "choose"])
def test_people_are_shown_the_question_as_the_task_words_it(kind: dict[str, Any], chat: bool) -> None:
    write(ROWS)
    asked = questions({**kind, **TEST}, chat)
    assert [question.shown for question in asked] == [f"question-{index} ?" for index in range(COUNT)]
    assert all(len(examples(question.prompt)) == SHOTS + 1 for question in asked)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", [GENERATE, CHOOSE], ids=["generate", "choose"])
@pytest.mark.parametrize("way", WAYS)
def test_no_prompt_holds_the_answer_to_its_question(way: str, kind: dict[str, Any], chat: bool) -> None:
    settings = {**kind, **WAYS[way]}
    if kind is CHOOSE and way == "examples that explain":
        settings["fewshot_config"] = {"doc_to_target": "label", "doc_to_choice": "{{choices}}"}
    write(ROWS)
    write(TRAIN, "train.jsonl")
    found = prompts(settings, chat)
    assert len(found) == COUNT
    for index, prompt in enumerate(found):
        *shown, asked = examples(prompt)
        assert asked == str(index)
        assert len(set(shown)) == len(shown) == SHOTS
        assert str(index) not in shown
        assert f"value-{index}" not in re.findall(r"value-\d+", prompt)
        assert {f"value-{number}" for number in shown} == set(re.findall(r"value-\d+", prompt))


@pytest.mark.parametrize("way", ["test split only", "the few-shot split is the test split", "documents of the gate"])
def test_copies_of_a_document_are_no_examples_of_it(way: str) -> None:
    """Copies that only differ in fields that are not asked, in blanks or in large letters."""
    copies = [row(0, source="a"), row(0, source="b"), row(1), row(1), {**row(2), "question": " Question-2\n"}]
    write([*ROWS, *copies])
    write([*TRAIN, *copies], "train.jsonl")
    found = prompts({**GENERATE, **WAYS[way]})
    assert len(found) == COUNT + len(copies)
    for prompt in found:
        *shown, asked = examples(prompt)
        assert len(shown) == SHOTS
        assert asked not in shown


def test_an_equal_question_with_another_answer_stays_an_example() -> None:
    """As where a task asks for one word again and again: only the document's own answer must not be seen."""
    write([{**row(index), "question": "question-0"} for index in range(COUNT)])
    for index, prompt in enumerate(prompts({**GENERATE, **TEST})):
        values = re.findall(r"value-\d+", prompt)
        assert len(values) == SHOTS
        assert f"value-{index}" not in values


@pytest.mark.parametrize(
    "way", ["test split only", "validation split only", "a few-shot split with some of the documents"]
)
@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_where_lm_eval_shows_other_documents_its_prompts_are_kept(way: str, sampler: str) -> None:
    write(ROWS)
    write(TRAIN, "train.jsonl")
    settings = {**GENERATE, **WAYS[way], "fewshot_config": {"sampler": sampler}}
    found = prompts(dict(settings), chat=False)
    (leaf,) = TaskManager(include_defaults=False).load("shots.yaml")["tasks"].values()
    leaf.set_fewshot_seed(SEED)
    theirs = [leaf.fewshot_context(doc, num_fewshot=SHOTS) for doc in leaf.eval_docs]
    sound = [index for index, prompt in enumerate(theirs) if examples(prompt).count(str(index)) == 1]
    assert sound
    assert (len(sound) == COUNT) == (way == "validation split only")  # lm_eval leaves the document out there, too
    assert [found[index] for index in sound] == [theirs[index] for index in sound]


def test_a_separate_split_of_examples_gives_the_prompts_of_lm_eval() -> None:
    write(ROWS)
    write(TRAIN[4:], "train.jsonl")
    found = prompts({**GENERATE, **WAYS["a few-shot split with some of the documents"]}, chat=False)
    (leaf,) = TaskManager(include_defaults=False).load("shots.yaml")["tasks"].values()
    leaf.set_fewshot_seed(SEED)
    assert found == [leaf.fewshot_context(doc, num_fewshot=SHOTS) for doc in leaf.eval_docs]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("short", [1, 2])
def test_too_few_other_documents_are_a_problem_before_anything_is_asked(way: str, short: int) -> None:
    rows = [row(index) for index in range(SHOTS + 2 - short)]
    write(rows)
    write(rows, "train.jsonl")
    settings = {**GENERATE, **WAYS[way]}
    if "samples" in settings.get("fewshot_config", {}):
        settings["fewshot_config"] = {"samples": rows}
    if short == 1:  # as many others as examples are asked for
        assert all(len(examples(prompt)) == SHOTS + 1 for prompt in prompts(settings))
        return
    with pytest.raises(BadInput, match=f"asks for {SHOTS} examples, but the task has only {SHOTS - 1}") as caught:
        prompts(settings)
    assert caught.value.problems[0].where == "tasks.mine.num_fewshot"
    assert all(len(examples(prompt)) == SHOTS for prompt in prompts({**GENERATE, **WAYS[way]}, num_fewshot=SHOTS - 1))


def test_each_task_of_a_group_keeps_its_own_documents_out(monkeypatch: pytest.MonkeyPatch) -> None:
    write(ROWS)
    folder = Path("tasks/family").resolve()
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        files = {"data_files": {"test": str(Path("data.jsonl").resolve())}}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({**GENERATE, **TEST, "task": name, "dataset_kwargs": files})
        )
    (folder / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    monkeypatch.setattr("posttrain.scoring.harness.tasks.tasks_folder", lambda: folder.parent)
    monkeypatch.setattr("posttrain.scoring.harness.tasks.registered_tasks", lambda: {"both": folder / "both.yaml"})
    both = GateTask(role=Role.lift, metric="exact_match")
    questions = prepare_task("both", both, tiny_tokenizer(), SEED).questions
    assert len(questions) == 2 * COUNT
    for question in questions:
        *shown, asked = examples(question.prompt)
        assert len(shown) == SHOTS
        assert asked not in shown


def test_whole_conversations_take_no_examples() -> None:
    (folder,) = plugin.register_eval_tasks()
    write([{"question": "a", "answer": "b"}])
    task = GateTask(
        task=str(folder / "own_questions.yaml"), role=Role.lift, metric="right", data="data.jsonl", num_fewshot=2
    )
    with pytest.raises(BadInput, match="whole conversations, which take no examples"):
        prepare_task("mine", task, tiny_tokenizer(), SEED)
