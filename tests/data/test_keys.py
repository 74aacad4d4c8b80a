"""Keys of records and messages: each is read, named as unread, or rejected when it would change what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from posttrain.config.schema import Format, Source
from posttrain.data.files import read_rows
from posttrain.data.mixing import describe_unread
from posttrain.data.reading import read_source
from posttrain.data.records import Conversation, Feedback, Preference
from posttrain.data.shapes import to_record
from posttrain.errors import BadInput
from posttrain.tokens.chat import ChatRenderer
from tests.support.tiny import tiny_tokenizer

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]

SFT = [
    {"messages": [USER, ANSWER]},
    {"conversations": SHARED},
    {"prompt": "Hi", "completion": "Hello"},
    {"prompt": [USER], "completion": [ANSWER]},
    {"instruction": "Hi", "output": "Hello"},
]
PAIRS = [
    {"prompt": "Hi", "chosen": "a", "rejected": "b"},
    {"conversations": SHARED[:1], "chosen": "a", "rejected": "b"},
    {"instruction": "Hi", "chosen": "a", "rejected": "b"},
    {"messages": [USER], "chosen": "a", "rejected": "b"},
    {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]},
]
ALL = [
    *((row, "conversations") for row in SFT),
    *((row, "preferences") for row in PAIRS),
    *(({**row, "label": False}, "feedback") for row in SFT),
]


def read(row: dict[str, Any], shape: str = "conversations") -> Any:
    return to_record(row, Format.auto, shape, "f.jsonl:3")


def turns(record: Conversation | Preference | Feedback) -> list[tuple[str, str]]:
    messages = record.messages if isinstance(record, Conversation) else record.prompt
    return [(message["role"], message["content"]) for message in messages]


def rejection(row: dict[str, Any], shape: str = "conversations") -> str:
    with pytest.raises(BadInput) as caught:
        read(row, shape)
    assert str(caught.value).startswith("f.jsonl:3: ")
    return str(caught.value)


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(("row", "shape"), ALL)
def test_a_system_prompt_of_a_record_is_its_first_turn(row: dict[str, Any], shape: str, key: str) -> None:
    record = read({**row, key: "Rhyme."}, shape)
    assert turns(record)[:2] == [("system", "Rhyme."), ("user", "Hi")]
    assert record.unread == ()
    assert turns(read({**row, key: ""}, shape)) == turns(read(row, shape))


def test_a_system_prompt_given_twice_is_one_turn_and_two_texts_are_rejected() -> None:
    chat = {"messages": [{"role": "system", "content": "Rhyme. "}, USER, ANSWER]}
    assert turns(read({**chat, "system": "Rhyme."})) == [("system", "Rhyme. "), ("user", "Hi"), ("assistant", "Hello")]
    assert "system is another text" in rejection({**chat, "system": "Shout."})
    assert "system_prompt is another text" in rejection({**SFT[0], "system": "Rhyme.", "system_prompt": "Shout."})


MARKS = ["train", "training", "trainable", "should_train", "loss", "loss_mask", "loss_weight", "loss_scale", "weight"]


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize("off", [False, 0, 0.0])
@pytest.mark.parametrize("shape", ["messages", "conversations"])
def test_an_answer_marked_as_context_is_not_trained(key: str, off: Any, shape: str) -> None:
    names = {"messages": ("role", "user", "assistant", "content"), "conversations": ("from", "human", "gpt", "value")}
    role, user, assistant, content = names[shape]
    asked = {role: user, content: "How much?", key: off}
    wrong, right = {role: assistant, content: "WRONG", key: off}, {role: assistant, content: "Right", key: not off}
    record = read({shape: [asked, wrong, asked, right]})
    rendered = ChatRenderer(tiny_tokenizer()).conversation(record)
    trained = [token for token, kept in zip(rendered.ids, rendered.mask, strict=True) if kept]
    assert tiny_tokenizer().decode(trained) == "Right<|end|>"


@pytest.mark.parametrize("key", MARKS)
@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "no", [1]])
def test_a_mark_that_is_neither_is_rejected(key: str, value: Any) -> None:
    assert f"{key} must be true or false" in rejection({"messages": [USER, {**ANSWER, key: value}]})


def test_marks_that_contradict_or_train_a_question_are_rejected() -> None:
    assert "contradict" in rejection({"messages": [USER, {**ANSWER, "weight": 0, "train": True}]})
    assert "only an assistant turn can have weight: 1" in rejection({"messages": [{**USER, "weight": 1}, ANSWER]})
    for key in ("mask", "train_detail"):
        assert f"{key} may mean" in rejection({"messages": [USER, {**ANSWER, key: [1]}]})


@pytest.mark.parametrize("key", ["weight", "train", "training", "sample_weight", "loss_mask"])
@pytest.mark.parametrize(("row", "shape"), ALL)
def test_a_record_is_not_weighed(row: dict[str, Any], shape: str, key: str) -> None:
    for value in (0, False, 0.5, 2, "0", "false", "half"):
        assert f"{key} of the record" in rejection({**row, key: value}, shape)
    for value in (1, True, "1", "True"):  # a text in a cell of a table
        assert read({**row, key: value}, shape).unread == ()


@pytest.mark.parametrize("key", ["image", "images", "videos", "audio"])
@pytest.mark.parametrize(("row", "shape"), ALL)
def test_what_is_no_text_is_rejected(row: dict[str, Any], shape: str, key: str) -> None:
    assert f"has {key}, but only text" in rejection({**row, key: ["cat.png"]}, shape)
    assert read({**row, key: []}, shape).unread == ()
    assert f"has {key}, but only text" in rejection({"messages": [{**USER, key: ["cat.png"]}, ANSWER]})


@pytest.mark.parametrize("label", [False, 0])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("row", SFT)
def test_answers_judged_bad_are_not_taught(row: dict[str, Any], key: str, label: Any) -> None:
    assert "the answer was judged bad" in rejection({**row, key: label})
    assert read({**row, key: not label}).unread == ()
    assert read({**row, key: "towns"}).unread == (key,)


@pytest.mark.parametrize(("row", "shape"), ALL)
def test_keys_that_nothing_reads_are_named(row: dict[str, Any], shape: str) -> None:
    assert read({**row, "id": 1, "score": 0.5, "empty": "", "none": None, "list": []}, shape).unread == ("id", "score")


def test_the_second_shape_of_a_record_is_named() -> None:
    assert read({**SFT[0], **SFT[2], **SFT[4]}).unread == ("prompt", "completion", "instruction", "output")
    assert read({**PAIRS[0], "messages": [USER]}, "preferences").unread == ("messages",)
    assert read({"messages": [USER, ANSWER], "rejected": "b"}).unread == ("rejected",)


def test_unread_keys_are_counted_with_their_first_place(tmp_path: Path) -> None:
    rows = [SFT[2], {**SFT[2], "id": 1}, {**SFT[2], "id": 2, "topic": "towns", "old": "x"}]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = list(read_source(Source(path=str(tmp_path / "f.jsonl")), "conversations"))
    [line] = describe_unread(records * 2)
    for named in ("'id' (2 records, first {}:2)", "'topic' (1 records, first {}:3)", "'old' (1 records, first {}:3)"):
        assert named.format(tmp_path / "f.jsonl") in line
    assert describe_unread(records[:1]) == []


def test_a_key_renamed_to_nothing_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(json.dumps({**SFT[2], "images": ["cat.png"]}))
    source = Source(path=str(tmp_path / "f.jsonl"), columns={"unused": "images"})
    assert [record.unread for record in read_source(source, "conversations")] == [()]


def test_keys_of_messages_are_named_when_the_template_does_not_write_them() -> None:
    tokenizer = tiny_tokenizer()
    chats = [read({"messages": [{**USER, "name": "Ann", "time": 5}, {**ANSWER, "time": 6}]}) for _ in range(2)]
    [line] = ChatRenderer(tokenizer).describe_unread(chats)
    assert "'name' of user turns (1 records, first f.jsonl:3)" in line
    assert "'time' of assistant turns" in line
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m.content ~ m.name ~ m.time")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message.content ~ message.name")
    [line] = ChatRenderer(tokenizer).describe_unread(chats)
    assert "'name'" not in line


def test_calls_in_openais_former_form_are_calls() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    chat = [USER, {"role": "assistant", "content": None, "function_call": call}]
    record = read(
        {"messages": [*chat, {"role": "function", "name": "add", "content": "2"}, ANSWER], "functions": [call]}
    )
    assert record.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]
    assert record.messages[2] == {"role": "tool", "name": "add", "content": "2"}
    assert record.tools == ({"type": "function", "function": call},)
    assert record.unread == ()


@pytest.mark.parametrize("key", ["parameters", "args", "input"])
def test_arguments_under_another_name_are_not_lost(key: str) -> None:
    chat = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "add", key: {"a": 1}}]}]}
    assert f"call 1 has no arguments, but {key}" in rejection(chat)


CALLS = [
    {"name": "weather", "arguments": {"city": "Rome", "where": {"street": "Via"}}},
    {"name": "add", "arguments": {"numbers": [{"a": 1}, {"b": 2}, None]}},
    {"name": "now", "arguments": {}},
]


def calling(call: dict[str, Any]) -> dict[str, Any]:
    tool = {"name": call["name"], "parameters": {"properties": {key: {"type": "string"} for key in call["arguments"]}}}
    called = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
    done = {"role": "tool", "content": "done"}
    return {"messages": [USER, called, done, ANSWER], "tools": [{"type": "function", "function": tool}]}


def test_keys_that_a_table_filled_with_null_are_absent_at_any_depth(tmp_path: Path) -> None:
    rows = [calling(call) for call in CALLS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_table, of_lines = (
        [(record.messages, record.tools) for record in read_source(Source(path=str(tmp_path / name)), "conversations")]
        for name in ("f.parquet", "f.jsonl")
    )
    assert of_table == of_lines


def test_null_that_the_data_holds_itself_is_kept(tmp_path: Path) -> None:
    row = calling({"name": "set", "arguments": {"x": None, "deep": [{"y": None}]}})
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    [record] = read_source(Source(path=str(tmp_path / "f.jsonl")), "conversations")
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None, "deep": [{"y": None}]}  # type: ignore[union-attr]
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    parquet.write_table(pyarrow.table({"m": pyarrow.array([{"x": None}], kind)}), tmp_path / "m.parquet")
    assert [row for _, row in read_rows(tmp_path / "m.parquet")] == [{"m": {"x": None}}]


def test_rows_of_the_hub_lose_the_nulls_of_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([calling(call) for call in CALLS])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    calls = [
        record.messages[1]["tool_calls"][0]["function"]["arguments"]  # type: ignore[union-attr]
        for record in read_source(Source(path="owner/name"), "conversations")
    ]
    assert calls == [call["arguments"] for call in CALLS]
