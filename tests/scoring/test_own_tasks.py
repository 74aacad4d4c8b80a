"""Tasks on your own files: questions with right answers, held-out responses and preferences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.artifact import ModelSource
from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.data import files
from posttrain.errors import BadInput
from posttrain.gate.spec import DocumentScore, GateRequest
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.rewards.matching import MATCHES
from posttrain.scoring import plugin
from posttrain.scoring.checks import check_tasks, read_slices
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.harness.documents import empty_halves
from posttrain.scoring.harness.requests import prepare_task
from posttrain.scoring.harness.tasks import preflight
from posttrain.scoring.systems import Loading
from posttrain.scoring.tasks import documents
from posttrain.scoring.tasks.metrics import right
from tests.support.adapters import Log
from tests.support.tiny import base_source, tiny_tokenizer, write_base

(FOLDER,) = plugin.register_eval_tasks()
METRICS = {"own_questions": "right", "held_out_responses": "bits_per_byte", "held_out_preferences": "acc_norm"}


def write(name: str, *rows: Any) -> str:
    Path(name).write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return name


def task(name: str, data: str | None, **settings: Any) -> GateTask:
    return GateTask(role=Role.lift, metric=METRICS[name], task=str(FOLDER / f"{name}.yaml"), data=data, **settings)


def asked(name: str, data: str, chat: bool = True) -> list[tuple[list[str], str]]:
    """Return the prompt of every request, and the target, of every document."""
    prepared = prepare_task("mine", task(name, data, chat=chat), tiny_tokenizer(), 0)
    return [([request.args[0] for request in one.requests], one.target) for one in prepared.questions]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return base_source(write_base(tmp_path_factory.mktemp("own") / "base"))


def scores(base: ModelSource, one: GateTask) -> list[DocumentScore]:
    request = GateRequest(
        stage="sft", gate=GateConfig(batch_size=4), tasks={"mine": one}, systems={"candidate": base}, dtype="float32",
        cache=Path("cache"), scorecard=Path("scorecard.jsonl"),
    )  # fmt: skip
    return list(evaluate(request, Log(), Loading(load_model, load_tokenizer, "cpu")).rows)


# --- Questions --------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Short."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def test_questions_are_asked_as_they_stand() -> None:
    data = write("q.jsonl", {"question": "6 * 7?", "answer": 42, "match": "numeric"}, {"messages": CHAT, "answer": "x"})
    assert asked("own_questions", data) == [
        (["<|user|>6 * 7?<|end|><|assistant|>"], "42"),
        (["<|system|>Short.<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"], "x"),
    ]
    assert asked("own_questions", data, chat=False)[1][0] == ["Short.\n\na\n\nb\n\nc\n\n"]


def test_slices_are_named_by_what_a_question_says_of_itself_and_it_is_the_same_question() -> None:
    rows = [{"question": f"{number}?", "answer": "x"} for number in range(3)]
    told = [{**row, "meta": {"topic": topic, "level": 1}} for row, topic in zip(rows, "aba", strict=True)]
    plain, sliced = write("plain.jsonl", *rows), write("sliced.jsonl", *told)
    asked, named = task("own_questions", plain), task("own_questions", sliced, slices=["topic", "level"])
    before, after = (prepare_task("mine", each, tiny_tokenizer(), 0) for each in (asked, named))
    assert read_slices({"mine": named}, [after]) == {
        "mine": {"topic": {"a": (0, 2), "b": (1,)}, "level": {"1": (0, 1, 2)}}
    }
    assert read_slices({"mine": asked}, [before]) == {}
    assert before.asked == after.asked
    with pytest.raises(BadInput, match="document 0 has no field topic"):
        preflight({"mine": task("own_questions", plain, slices=["topic"])})
    group = replace(before, leaves=[*before.leaves, *before.leaves])
    assert read_slices({"mine": asked}, [group]) == {"mine": {"task": {"own_questions": (0, 1, 2)}}}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("held_out_responses", {"prompt": "a", "completion": "b"}),
        ("held_out_preferences", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ],
)
def test_responses_and_pairs_are_sliced_by_meta_and_by_keys_that_nothing_reads(name: str, row: dict[str, str]) -> None:
    rows = [{**row, "prompt": f"a{number}"} for number in range(3)]
    plain = write("plain.jsonl", *rows)
    told = [{**each, "topic": topic, "meta": {"level": 1}} for each, topic in zip(rows, "aba", strict=True)]
    sliced = write("sliced.jsonl", *told)
    asked, named = task(name, plain), task(name, sliced, slices=["topic", "level"])
    before, after = (prepare_task("mine", one, tiny_tokenizer(), 0) for one in (asked, named))
    assert read_slices({"mine": named}, [after]) == {
        "mine": {"topic": {"a": (0, 2), "b": (1,)}, "level": {"1": (0, 1, 2)}}
    }
    assert [one.document_hash for one in before.questions] == [one.document_hash for one in after.questions]
    assert [one.place for one in after.questions] == ["sliced.jsonl:1", "sliced.jsonl:2", "sliced.jsonl:3"]
    with pytest.raises(BadInput, match="document 0 has no field kind"):
        preflight({"mine": task(name, sliced, slices=["kind"])})


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (documents.questions, {"question": "1 + 1?", "answer": "2"}),
        (documents.responses, {"prompt": "a", "completion": "b", "topic": "c"}),
        (documents.preferences, {"prompt": "a", "chosen": "b", "rejected": "c", "topic": "d"}),
    ],
)
def test_a_file_is_read_once(read: Any, row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    original = files.opened
    monkeypatch.setattr(files, "opened", lambda path, place: opened.append(path) or original(path, place))
    assert len(read({"test": write("own.jsonl", row, row)})["test"]) == 2
    assert opened == [Path("own.jsonl")]


def test_an_own_question_has_its_file_and_line() -> None:
    Path("questions.jsonl").write_text('{"question": "a", "answer": "b"}\n\n{"question": "c", "answer": "d"}\n')
    prepared = prepare_task("mine", task("own_questions", "questions.jsonl"), tiny_tokenizer(), 0)
    assert [one.place for one in prepared.questions] == ["questions.jsonl:1", "questions.jsonl:3"]


@pytest.mark.parametrize(
    ("match", "answer", "yes", "no"),
    [
        ("exact", "Paris", [" Paris\n"], ["paris", "Paris.", ""]),
        ("exact", ["Paris", "Lutetia"], ["Lutetia"], ["Paris Lutetia"]),
        ("contains", "Paris", ["It is PARIS.", "Parisian"], ["Par is"]),
        ("regex", r"\b4\d\b", ["about 42 of them"], ["142", ""]),
        ("numeric", 42, ["42", "6 * 7 = 42.0", "so 42.", "4.2e1"], ["7 * 6", "", "42 or 43", "-42"]),
        ("numeric", "1,234.5", ["1234.5", "It costs 1,234.50"], ["1234"]),
        ("numeric", -3, ["-3", "it is −3"], ["3"]),
        ("numeric", [1, 2], ["2"], ["3"]),
        ("json", {"a": [1, True]}, ['{"a": [1, true]}', 'Here:\n```json\n{"a":[1,true]}\n```'], ['{"a": [1, 1]}', "a"]),
        ("json", [1, 2], ["[1, 2]"], ["1", "[2, 1]"]),
    ],
)
def test_what_is_right(match: str, answer: Any, yes: list[str], no: list[str]) -> None:
    options = answer if isinstance(answer, list) and match != "json" else [answer]
    doc = {"match": match, "answer": json.dumps(options)}
    assert [right(doc, [text]) for text in yes] == [{"right": 1.0}] * len(yes)
    assert [right(doc, [text]) for text in no] == [{"right": 0.0}] * len(no)


@pytest.mark.parametrize("answer", [0, 1, 1.0, -2, "1,000", [0, 1]])
def test_every_number_is_an_answer(answer: Any) -> None:
    """0 and 1 too, which Python takes for equal to False and True."""
    ((_, target),) = asked("own_questions", write("q.jsonl", {"question": "a", "answer": answer, "match": "numeric"}))
    assert target == " or ".join(map(str, answer if isinstance(answer, list) else [answer]))


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(alphabet="abc .:=\n"))
def test_a_number_is_found_wherever_it_stands(number: float, before: str) -> None:
    doc = {"match": "numeric", "answer": json.dumps([number])}
    assert right(doc, [f"{before} {number!r}"]) == {"right": 1.0}


@given(st.text(), st.sampled_from(sorted(MATCHES)))
def test_no_text_breaks_a_match(text: str, match: str) -> None:
    answer: Any = {"numeric": 1, "json": {"a": 1}}.get(match, "a+")
    assert right({"match": match, "answer": json.dumps([answer])}, [text])["right"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "a", "anwser": "b"}, "Did you mean answer?"),
        ({"question": "a"}, "has no answer"),
        ({"answer": "b"}, "needs either question or messages"),
        ({"question": "a", "messages": CHAT, "answer": "b"}, "needs either question or messages"),
        ({"question": "a", "answer": "b", "match": "exakt"}, "Did you mean exact?"),
        ({"question": "a", "answer": "", "match": "contains"}, "cannot look for the answer ''"),
        ({"question": "a", "answer": "(", "match": "regex"}, r"cannot look for the answer '\('"),
        ({"question": "a", "answer": "many", "match": "numeric"}, "cannot look for the answer 'many'"),
        ({"question": "a", "answer": True, "match": "numeric"}, "cannot look for the answer True"),
        ({"question": "a", "answer": "inf", "match": "numeric"}, "cannot look for the answer 'inf'"),
        ({"question": "a", "answer": False}, "cannot look for the answer False"),
        ({"question": "a", "answer": 3}, "match: exact cannot look for the answer 3"),
        ({"question": "a", "answer": []}, "has no answer"),
        ({"messages": CHAT[:3], "answer": "b"}, "does not end with a question"),
        ({"question": 3, "answer": "b"}, "content"),
    ],
)
def test_a_bad_question_is_named_with_its_line(row: dict[str, Any], complaint: str) -> None:
    data = write("q.jsonl", {"question": "a", "answer": "b"}, row)
    with pytest.raises(BadInput, match=complaint) as caught:
        preflight({"mine": task("own_questions", data)})
    assert "q.jsonl:2" in caught.value.problems[0].where


def test_questions_are_scored(base: ModelSource) -> None:
    data = write("q.jsonl", {"question": "a", "answer": ".", "match": "regex"}, {"question": "b", "answer": "no"})
    assert [row.metrics for row in scores(base, task("own_questions", data))] == [{"right": 1.0}, {"right": 0.0}]


def test_without_a_file_there_is_nothing_to_ask() -> None:
    with pytest.raises(BadInput, match="no documents of its own"):
        preflight({"mine": task("own_questions", None)})
    assert check_tasks({name: task(name, write("q.jsonl", {"a": 1})) for name in METRICS}) == []


# --- Responses and preferences ----------------------------------------------------------------------------------------


def test_responses_are_read_as_training_data_is() -> None:
    chat = {"messages": [*CHAT, {"role": "assistant", "content": "last"}]}
    data = write("r.jsonl", {"instruction": "do", "input": "", "output": "done"}, chat)
    assert asked("held_out_responses", data) == [
        (["<|user|>do<|end|><|assistant|>"], "done"),
        (["<|system|>Short.<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"], "last"),
    ]


def test_bits_per_byte_are_those_of_the_models_own_probabilities(base: ModelSource) -> None:
    pairs = [("say it", "done so"), ("again and again", "x"), ("and a long one", "y" * 70)]
    data = write("r.jsonl", *({"prompt": prompt, "completion": answer} for prompt, answer in pairs))
    rows = scores(base, task("held_out_responses", data, chat=True))
    model, tokenizer = load_model(base, "float32").double(), load_tokenizer(base)
    for row, (prompt, answer) in zip(rows, pairs, strict=True):
        ids = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>{answer}", return_tensors="pt").input_ids
        count = len(tokenizer(answer).input_ids)
        with torch.no_grad():
            chosen = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        bits = -float(chosen[-count:].sum()) / math.log(2) / len(answer.encode())
        assert row.metrics == {"bits_per_byte": pytest.approx(bits, rel=1e-5)}


def test_preferences_are_read_as_training_data_is(base: ModelSource) -> None:
    turn = {"role": "assistant", "content": "yes"}
    rows = [
        {"prompt": "do", "chosen": "yes", "rejected": "no"},
        {"chosen": [*CHAT, turn], "rejected": [*CHAT, {**turn, "content": "no"}]},
    ]
    data = write("p.jsonl", *rows)
    prompts = asked("held_out_preferences", data)
    assert [target for _, target in prompts] == ["yes", "yes"]
    assert [len(set(given)) for given, _ in prompts] == [1, 1]
    assert prompts[1][0][0].endswith("<|user|>c<|end|><|assistant|>")
    assert {row.metrics["acc_norm"] for row in scores(base, task("held_out_preferences", data, chat=True))} <= {
        0.0,
        1.0,
    }


def test_an_answer_that_calls_a_tool_is_no_text() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    row = {"messages": [CHAT[1], {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(BadInput, match="calls tools"):
        preflight({"mine": task("held_out_responses", write("r.jsonl", row))})


def test_a_guard_without_a_document_of_a_half_cannot_choose_a_share() -> None:
    many = write("many.jsonl", *({"question": f"q{number}", "answer": "a"} for number in range(40)))
    few = write("few.jsonl", {"question": "q", "answer": "a"})
    lift = task("own_questions", few)
    guards = {"mine": replace(task("own_questions", few), role=Role.guard), "other": lift}
    (problem,) = empty_halves(GateConfig(), guards)
    assert problem.where == "tasks.mine"
    assert "none of its 1 documents is of the half that" in problem.what
    enough = replace(task("own_questions", many), role=Role.guard)
    assert [*empty_halves(GateConfig(), {"mine": enough})] == []
    assert len([*empty_halves(GateConfig(), {"mine": replace(enough, limit=1)})]) == 1
