"""Calls of tools as each template wants them, and turns that a template writes differently once others follow."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import pytest

from posttrain.data.records import Conversation, Message, Preference
from posttrain.engine.config import TrainOn
from posttrain.errors import BadInput
from posttrain.sft.examples import Rendering, rows_of, split_eval
from posttrain.tokens.chat import ChatRenderer
from posttrain.tokens.dialect import CallDialect
from tests.support.chat_templates import CHATML, MISTRAL_V3, QWEN3, make_tokenizer

CALLING = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}
    {%- for call in m.tool_calls or [] %}
        {{- '<call>' + call.function.name + ' ' + WRITTEN + '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
FORMS = {
    "objects": "(call.function.arguments | tojson)",
    "text": "call.function.arguments",
    "text as it is": "(call.function.arguments | string)",
    "either": "(call.function.arguments if call.function.arguments is string else call.function.arguments | tojson)",
}
STRICT_IDS = MISTRAL_V3.replace(
    "[TOOL_CALLS] [' }}",
    "[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}{%- if call.id is not defined or call.id | length != 9 %}"
    "{{- raise_exception('ids have nine characters') }}{%- endif %}{%- endfor %}",
).replace('{"content": ', '{"id": "\' + m.tool_call_id + \'", "content": ')
HARMONY_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>"]
HARMONY = """
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.thinking and loop.index0 > ns.asked %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {%- if m.tool_calls %}
            {%- set call = m.tool_calls[0].function %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- (call.arguments | tojson) + '<|call|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
            {{- '<|return|>' if loop.last else '<|end|>' }}
        {%- endif %}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def said(content: str, **extra: Any) -> Message:
    return {"role": "assistant", "content": content, **extra}


def calling(*ids: str | None, **extra: Any) -> Message:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwölf"}}} for _ in ids]
    return said("", tool_calls=[c | ({"id": i} if i else {}) for c, i in zip(calls, ids, strict=True)], **extra)


def result(answered: str | None = None) -> Message:
    return {"role": "tool", "content": "13", **({"tool_call_id": answered} if answered else {})}


def record(*messages: Message) -> Conversation:
    return Conversation(messages=messages, where="data.jsonl:7")


def harmony() -> Any:
    tokenizer = make_tokenizer(HARMONY)
    tokenizer.add_special_tokens({"additional_special_tokens": HARMONY_TOKENS}, replace_extra_special_tokens=False)
    return tokenizer


def trained(tokenizer: Any, chat: Conversation, train_on: str = "all") -> list[list[str]]:
    """The decoded text of every run of trained tokens, by row; the masks are proven a second time."""
    rows = []
    for row in Rendering(tokenizer, TrainOn(train_on)).rows([chat]):
        pairs = zip(row.rendered.ids, row.rendered.mask, strict=True)
        runs = [[token for token, _ in run] for on, run in groupby(pairs, key=lambda pair: pair[1]) if on]
        rows.append([tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs])
    return rows


@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_written_as_json_whatever_the_template_wants(form: str) -> None:
    tokenizer = make_tokenizer(CALLING.replace("WRITTEN", FORMS[form]))
    chat = record(user("1+zwölf"), calling(None), result(), said("13"))
    assert trained(tokenizer, chat) == [['<call>add {"a": 1, "b": "zwölf"}</call><|im_end|>', "13<|im_end|>"]]


@pytest.mark.parametrize(
    "written",
    [
        "call.function.arguments.items() | map('join', '=') | join(', ')",
        "(call | tojson)",
        "((call.function | tojson))",
    ],
)
def test_templates_of_objects_get_objects(written: str) -> None:
    [[called, _]] = trained(
        make_tokenizer(CALLING.replace("WRITTEN", written)), record(user("?"), calling(None), result(), said("13"))
    )
    assert "zwölf" in called
    assert '\\"' not in called


@pytest.mark.parametrize("given", [("call_1", "call_2"), (None, None), ("a1b2c3d4e", "call_2"), ("a1b2c3d4e", None)])
def test_ids_of_nine_characters_are_the_same_in_call_and_result(given: tuple[str | None, str | None]) -> None:
    first, second = given
    several = record(user("?"), calling(first, second), result(first), result(second), said("13"))
    tokenizer = make_tokenizer(STRICT_IDS)
    one, other = (ChatRenderer(tokenizer).conversation(several).text for _ in range(2))
    assert one == other, "the same data gives the same text"
    ids = re.findall(r'"id": "([^"]*)"', one)
    assert ids[:2] == ids[2:]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("[A-Za-z0-9]{9}", each) for each in ids)
    assert ("a1b2c3d4e" in ids) == ("a1b2c3d4e" in given)


def test_results_out_of_order_keep_their_call() -> None:
    chat = record(user("?"), calling("call_1", "call_2"), result("call_2"), result("call_1"), said("13"))
    ids = re.findall(r'"id": "([^"]*)"', ChatRenderer(make_tokenizer(STRICT_IDS)).conversation(chat).text)
    assert ids[:2] == ids[:1:-1]


def test_ids_stay_as_they_are_where_the_template_takes_any() -> None:
    chat = record(user("?"), calling("call_1"), result("call_1"), said("13"))
    assert '"id": "call_1"' in ChatRenderer(make_tokenizer(MISTRAL_V3)).conversation(chat).text
    assert Preference(prompt=chat.messages[:1], chosen=chat.messages[1:2], rejected=(said("No"),), where="x")
    pair = Preference(prompt=(user("?"),), chosen=(calling("call_1"),), rejected=(said("No"),), where="x")
    tokenizer = make_tokenizer(STRICT_IDS)
    assert '"id": "' in tokenizer.decode(ChatRenderer(tokenizer).preference(pair).chosen)


THOUGHTFUL = (user("1+zwölf"), calling(None, reasoning_content="hm"), result(), said("13", reasoning_content="so"))
ANALYSIS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
CALL = ANALYSIS.format("hm") + ' to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": "zwölf"}<|call|>'
FINAL = ANALYSIS.format("so") + "<|channel|>final<|message|>13<|return|>"


def test_a_call_may_end_in_another_stop_token_than_an_answer() -> None:
    assert trained(harmony(), record(*THOUGHTFUL)) == [[CALL, FINAL]]


@pytest.mark.parametrize("tokenizer", [harmony(), make_tokenizer(QWEN3)], ids=["harmony", "qwen3"])
def test_turns_that_change_once_others_follow_name_the_way_out(tokenizer: Any) -> None:
    chat = record(*THOUGHTFUL, user("And?"), said("So.", reasoning_content="hm"))
    with pytest.raises(BadInput, match="once other turns follow") as caught:
        trained(tokenizer, chat)
    assert "train_on=each" in str(caught.value)
    assert len(trained(tokenizer, chat, "each")) == 3


def test_each_answer_is_a_row_under_the_prompt_that_asks_for_it() -> None:
    tokenizer = harmony()
    chat = record(*THOUGHTFUL, user("And?"), said("So.", reasoning_content="hm"))
    rows = trained(tokenizer, chat, "each")
    assert rows == [[CALL], [FINAL], [ANALYSIS.format("hm") + "<|channel|>final<|message|>So.<|return|>"]]
    for example, last in zip(Rendering(tokenizer, TrainOn.each).rows([chat]), (1, 3, 5), strict=True):
        listed = [dict(message) for message in chat.messages[:last]]
        asked = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
        assert example.rendered.text.startswith(asked)
        assert example.rendered.mask.index(True) == len(tokenizer(asked, add_special_tokens=False)["input_ids"])


def test_each_trains_the_tokens_of_all_where_the_template_keeps_turns() -> None:
    tokenizer = make_tokenizer(CHATML)
    chat = record(user("Hi"), said("Hello"), user("And?"), said("No", train=False), user("Hm"), said("So."))
    [whole] = trained(tokenizer, chat)
    assert [run for [run] in trained(tokenizer, chat, "each")] == whole == ["Hello<|im_end|>", "So.<|im_end|>"]
    untrained = record(user("Hi"), said("No", train=False))
    assert rows_of(untrained, TrainOn.each) == [untrained]
    assert trained(tokenizer, untrained, "each") == [[]]


def test_rows_of_a_conversation_are_set_aside_together() -> None:
    talks = [
        record(user("Hi"), said("Hello"), user(f"And {number}?"), said("So."), user("Hm"), said("Yes"))
        for number in range(10)
    ]
    table = Rendering(make_tokenizer(CHATML), TrainOn.each).table(talks)
    kept, held = split_eval(table.all(), 0.3, seed=1)
    assert (len(kept), len(held)) == (21, 6), "the first answer, equal in all, is trained and not measured"
    assert not set(kept.digests) & set(held.digests)


def test_a_conversation_without_calls_asks_the_template_nothing() -> None:
    def write(messages: object) -> str:
        raise AssertionError("rendered")

    chat = Conversation(where="here", messages=({"role": "user", "content": "a"},))
    assert CallDialect(write).adapt(chat) is chat
