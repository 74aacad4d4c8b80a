"""Shapes: every shape of record becomes the same records, and what breaks the rules is named by turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain.config.schema import Format
from posttrain.data.records import Conversation, Feedback, Preference
from posttrain.data.shapes import to_record
from posttrain.errors import BadInput

PAIR = {"prompt": "Hi", "completion": "Hello"}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def conversation(row: dict[str, Any], form: Format = Format.auto) -> list[tuple[str, str]]:
    record = to_record(row, form, "conversations", "f:1")
    assert isinstance(record, Conversation)
    return [(message["role"], message["content"]) for message in record.messages]


def preference(row: dict[str, Any]) -> tuple[list[tuple[str, str]], str, str]:
    record = to_record(row, Format.auto, "preferences", "f:1")
    assert isinstance(record, Preference)
    assert [m["role"] for m in (*record.chosen, *record.rejected)] == ["assistant", "assistant"]
    prompt = [(message["role"], message["content"]) for message in record.prompt]
    return prompt, record.chosen[0]["content"], record.rejected[0]["content"]


def row_rejection(row: dict[str, Any], shape: str = "conversations", form: Format = Format.auto) -> str:
    with pytest.raises(BadInput) as caught:
        to_record(row, form, shape, "f.jsonl:3")
    assert str(caught.value).startswith("f.jsonl:3: ")
    return str(caught.value)


# shapes of conversations

TURNS = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [USER, ANSWER], "prompt": "Hi", "prompt_id": "x"}, TURNS),
        ({"conversations": [USER, ANSWER]}, TURNS),
        ({"prompt": "Hi", "completion": "Hello"}, TURNS),
        ({"prompt": [USER], "completion": [ANSWER]}, TURNS),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, TURNS),
        ({"instruction": "Hi", "output": "Hello", "input": None, "system": None}, TURNS),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, [("user", "Add\n1 1"), ("assistant", "2")]),
        (
            {"instruction": "And?", "output": "So.", "system": "Be kind", "history": [["Hi", "Hello"]]},
            [("system", "Be kind"), *TURNS, ("user", "And?"), ("assistant", "So.")],
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, TURNS),
        (
            {
                "system": "Be kind",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            },
            [("system", "Be kind"), *TURNS],
        ),
        ({"messages": [USER, ANSWER, USER]}, [*TURNS, ("user", "Hi")]),
        ({"messages": [USER, USER, ANSWER, ANSWER]}, [TURNS[0], *TURNS, TURNS[1]]),
        ({"messages": [{**USER, "train": False}, {**ANSWER, "train": False}]}, TURNS),
        (
            {"prompt": [USER, {**ANSWER, "train": False}, USER], "completion": "Hello"},
            [*TURNS, *TURNS],
        ),
        (
            {"messages": [USER, ANSWER, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, ANSWER]},
            [*TURNS, ("tool", "1"), ("tool", "2"), ("assistant", "Hello")],
        ),
    ],
)
def test_shapes_of_conversations(row: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert conversation(row) == turns


def test_the_format_can_be_given() -> None:
    row = {"messages": [USER, ANSWER], "chosen": "a", "rejected": "b"}
    assert conversation(row, Format.messages) == TURNS
    assert "content must be a string, not null" in row_rejection(PAIR, form=Format.alpaca)


def test_unknown_shapes_list_what_was_seen_and_what_is_known() -> None:
    message = row_rejection({"text": "Once", "prompt": None})
    assert "its keys: text, prompt (null)" in message
    for keys in ("messages", "prompt, completion", "instruction, output", "chosen, rejected", "from, value"):
        assert keys in message
    assert "its keys: none" in row_rejection({})


def test_the_wrong_shape_for_the_stage_says_which_is_needed() -> None:
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    assert "shape preference, but the stage needs conversations" in row_rejection(pair)
    assert "shape prompt_completion, but the stage needs preferences" in row_rejection(PAIR, "preferences")
    assert "shape messages, but the stage needs preferences" in row_rejection(pair, "preferences", Format.messages)


def test_answers_judged_bad_are_not_taught() -> None:
    assert "label is false" in row_rejection({"messages": [USER, ANSWER], "label": False})
    assert conversation({"messages": [USER, ANSWER], "label": True}) == TURNS


JUDGED = [
    {"messages": [USER, ANSWER], "prompt": None, "completion": None},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Hi", "output": "Hello"},
    {"prompt": "Hi", "completion": "Hello"},
]


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("form", [Format.auto, Format.feedback])
@pytest.mark.parametrize("row", JUDGED)
def test_the_last_turn_of_a_conversation_with_a_label_is_judged(row: dict[str, Any], form: Format, label: bool) -> None:
    record = to_record(row | {"label": label}, form, "feedback", "f:1")
    assert isinstance(record, Feedback)
    assert [(turn["role"], turn["content"]) for turn in (*record.prompt, *record.completion)] == TURNS
    assert (len(record.completion), record.label) == (1, label)


def test_what_judges_no_answer_is_rejected() -> None:
    assert "must end in one assistant turn" in row_rejection(
        {"messages": [USER, ANSWER, USER], "label": True}, "feedback"
    )
    assert "label must be true or false, not 'yes'" in row_rejection(JUDGED[0] | {"label": "yes"}, "feedback")
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b", "label": True}
    assert "without a single answer" in row_rejection(pair, "feedback", Format.feedback)


def said(role: Any, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([said("human"), ANSWER], r"turn 1 of messages: role 'human' is unknown\n.*Did you mean user\?"),
        ([said("User"), ANSWER], r"role 'User' is unknown\n.*Did you mean user\?"),
        ([USER, said("asistant")], r"turn 2 .*role 'asistant' is unknown\n.*Did you mean assistant\?"),
        ([said(["user"]), ANSWER], r"role \['user'\] is unknown"),
        ([{"content": "x"}, ANSWER], "turn 1 of messages has no role"),
        ([USER, {"role": "assistant"}], r"turn 2 of messages \(assistant\): content must be a string, not null"),
        ([USER, said("assistant", None)], "content must be a string, not null"),
        ([USER, said("assistant", 7)], "content must be a string, not 7"),
        ([USER, said("assistant", [{"type": "text"}])], "part 1 of content: text must be a string, not null"),
        ([USER, said("assistant", "")], "content is empty"),
        ([USER, said("assistant", " \n")], r"turn 2 of messages \(assistant\): content is empty"),
        ([ANSWER, USER], r"turn 1 \(assistant\) begins the conversation"),
        ([USER, said("system"), ANSWER], r"turn 2 \(system\) follows user"),
        ([said("system"), said("system"), USER, ANSWER], r"turn 2 \(system\) follows system"),
        ([said("system"), ANSWER], r"turn 2 \(assistant\) follows system"),
        ([USER, said("tool"), ANSWER], r"turn 2 \(tool\) follows user"),
        (
            [{**USER, "train": True}, ANSWER],
            r"turn 1 of messages \(user\): only an assistant turn can have train",
        ),
        ([USER, {**ANSWER, "train": "no"}], r"turn 2 .*: train must be true or false, not 'no'"),
        ([USER, {**ANSWER, "refuses": "yes"}], r"turn 2 .*: refuses must be true or false, not 'yes'"),
        (
            [{**USER, "refuses": True}, ANSWER],
            r"turn 1 of messages \(user\): only an assistant turn can have refuses: true",
        ),
        ([{**USER, "tool_calls": [{"name": "f"}]}, ANSWER], "only an assistant turn can have tool_calls"),
        ([USER, said("assistant", None) | {"tool_calls": []}], "content must be a string, not null"),
        ([USER, {**ANSWER, "tool_calls": "f"}], "tool_calls must be a list, not 'f'"),
        ([USER, {**ANSWER, "tool_calls": ["f"]}], "call 1 must be an object"),
        ([USER, {**ANSWER, "tool_calls": [{"function": {}}]}], "call 1 names no function"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "x"}]}], "arguments must be an object, not 'x'"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[" * 10**5}]}], "arguments must be an object"),
        ([USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "1" * 5000}]}], "arguments must be an object"),
        ([USER], "no assistant turn"),
        ([], r"messages must be a list of messages, not \[\]"),
        ("Hi", "messages must be a list of messages, not 'Hi'"),
        (["Hi"], "turn 1 of messages must be an object"),
    ],
)
def test_turns_that_break_the_rules_are_named(messages: Any, what: str) -> None:
    with pytest.raises(BadInput, match=f"^f.jsonl:3: .*{what}"):
        to_record({"messages": messages}, Format.auto, "conversations", "f.jsonl:3")


ADD = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(("value", "calls"), [(json.dumps(ADD), 1), (ADD, 1), (json.dumps([ADD, ADD]), 2), ([ADD], 1)])
def test_sharegpt_calls_and_what_was_observed(value: object, calls: int) -> None:
    said = [("human", "1+1?"), ("function_call", value), ("observation", "2"), ("gpt", "It is 2.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said], "tools": json.dumps([ADD])}
    record = to_record(row, Format.auto, "conversations", "f:1")
    assert isinstance(record, Conversation)
    asked, called, observed, told = record.messages
    assert called == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": ADD}] * calls,
    }
    assert observed == {"role": "tool", "content": "2"}
    assert (asked["role"], told["content"]) == ("user", "It is 2.")


@pytest.mark.parametrize("value", ["add(1)", "[]", None, 3])
def test_sharegpt_calls_that_are_none_are_rejected(value: object) -> None:
    said = [("human", "1+1?"), ("function_call", value), ("observation", "2"), ("gpt", "It is 2.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said]}
    assert "turn 2 of conversations (function_call) must be a call" in row_rejection(row)


def test_results_belong_to_calls_and_calls_of_a_turn_have_ids_of_their_own() -> None:
    def row(made: list[str], answered: str) -> dict[str, Any]:
        calls = [{**ADD, "id": key} for key in made]
        called = {"role": "assistant", "content": "", "tool_calls": calls}
        return {"messages": [USER, called, {"role": "tool", "content": "2", "tool_call_id": answered}, ANSWER]}

    assert len(conversation(row(["one", "two"], "two"))) == 4
    assert "turn 3 (tool) answers the call 'three'" in row_rejection(row(["one", "two"], "three"))
    assert "two calls have the id 'one'" in row_rejection(row(["one", "one"], "one"))


def test_sharegpt_roles_are_checked() -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gtp", "value": "Hello"}]}
    assert "Did you mean gpt?" in row_rejection(row)


def test_prompts_with_answers_belong_in_messages() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": "Hello"}
    assert "prompt holds an assistant turn" in row_rejection(row)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "add", "arguments": {"a": 1}},
        {"name": "add", "arguments": '{"a": 1}', "id": None},
        {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
    ],
)
@pytest.mark.parametrize("silence", [{}, {"content": None}, {"content": ""}])
def test_calls_of_tools_are_read_in_one_dialect(call: dict[str, Any], silence: dict[str, Any]) -> None:
    messages = [USER, {"role": "assistant", "tool_calls": [call], **silence}, {"role": "tool", "content": ""}, ANSWER]
    record = to_record({"messages": messages}, Format.auto, "conversations", "f:1")
    assert isinstance(record, Conversation)
    assert record.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_tools_are_definitions_or_the_same_as_json() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    for value in (tools, json.dumps(tools)):
        record = to_record({"messages": [USER, ANSWER], "tools": value}, Format.auto, "conversations", "f:1")
        assert record.tools == tuple(tools)
    assert "tools must be a list of definitions" in row_rejection({"messages": [USER, ANSWER], "tools": "add"})
    assert "tool 1 has no name" in row_rejection({"messages": [USER, ANSWER], "tools": [{}]})


def test_history_must_be_pairs() -> None:
    assert "history must be a list of [question, answer]" in row_rejection(
        {"instruction": "Hi", "output": "Hello", "history": ["Hi"]}
    )


# shapes of preferences

GPT = {"from": "gpt", "value": "good"}
BAD = {"role": "assistant", "content": "bad"}
ASKED = [("user", "Hi")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "good", "rejected": "bad"}, ASKED),
        ({"prompt": [USER], "chosen": [said("assistant", "good")], "rejected": [said("assistant", "bad")]}, ASKED),
        ({"chosen": [USER, said("assistant", "good")], "rejected": [USER, said("assistant", "bad")]}, ASKED),
        (
            {"prompt": "Hi", "chosen": [USER, said("assistant", "good")], "rejected": [USER, said("assistant", "bad")]},
            ASKED,
        ),
        (
            {"prompt": "Hi", "chosen": [said("system", "S"), USER, GPT], "rejected": [said("system", "S"), USER, BAD]},
            [("system", "S"), *ASKED],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}], "chosen": GPT, "rejected": {**GPT, "value": "bad"}},
            ASKED,
        ),
        ({"instruction": "Hi", "input": "", "chosen": "good", "rejected": "bad"}, ASKED),
        ({"messages": [said("system", "S"), USER], "chosen": "good", "rejected": "bad"}, [("system", "S"), *ASKED]),
        (
            {
                "chosen": [USER, ANSWER, USER, said("assistant", "good")],
                "rejected": [USER, ANSWER, USER, said("assistant", "bad")],
            },
            [*TURNS, ("user", "Hi")],
        ),
    ],
)
def test_shapes_of_preferences(row: dict[str, Any], prompt: list[tuple[str, str]]) -> None:
    assert preference(row) == (prompt, "good", "bad")


GOOD_SIDE = said("assistant", "good")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "a "}, "chosen and rejected are the same"),
        ({"prompt": "Hi", "chosen": "", "rejected": "a"}, "chosen: content is empty"),
        ({"prompt": "Hi", "chosen": [], "rejected": "a"}, "chosen must be a list of messages"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt: content is empty"),
        ({"chosen": "a", "rejected": "b"}, "no prompt: chosen and rejected"),
        ({"prompt": "Hi", "chosen": [USER], "rejected": "b"}, "chosen must end in one assistant turn"),
        ({"prompt": "Hi", "chosen": "a", "rejected": [GOOD_SIDE, USER]}, "rejected must end in one assistant turn"),
        (
            {"prompt": "Hi", "chosen": [GOOD_SIDE, USER, GOOD_SIDE], "rejected": "b"},
            "it has assistant, user, assistant",
        ),
        ({"chosen": [USER, GOOD_SIDE], "rejected": [said("user", "Ho"), ANSWER]}, "do not begin with the same turns"),
        ({"prompt": "Ho", "chosen": [USER, GOOD_SIDE], "rejected": [USER, ANSWER]}, "prompt differs from the turns"),
        ({"prompt": [USER, ANSWER], "chosen": "a", "rejected": "b"}, "the prompt ends with an assistant turn"),
        (
            {"prompt": "Hi", "chosen": [{**GOOD_SIDE, "train": False}], "rejected": "b"},
            "chosen is marked train: false",
        ),
        ({"prompt": "Hi", "chosen": "a"}, "unknown shape of record; its keys: prompt, chosen"),
    ],
)
def test_preferences_that_cannot_be_used(row: dict[str, Any], what: str) -> None:
    assert what in row_rejection(row, "preferences")
