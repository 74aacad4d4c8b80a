"""What is trained, by the templates of real models: which turns, thoughts, and calls of tools."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import distribution
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.records import Conversation, Message, Preference
from posttrain.errors import BadInput
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.packing import pack
from tests.support.chat_templates import (
    ALPACA_SYSTEM,
    CHATML,
    DEEPSEEK,
    DEEPSEEK_R1,
    EMPTY_THOUGHT,
    FORGETFUL,
    GEMMA3,
    LLAMA31,
    MARKED,
    MISTRAL,
    MISTRAL_V3,
    NO_GENERATION_PROMPT,
    PHI3,
    PHI4,
    QWEN2,
    QWEN3,
    SILENT,
    ZEPHYR,
    make_tokenizer,
)

# template, stop token, what the model writes before the content
SHAPES = {
    "chatml": (CHATML, "<|im_end|>", ""),
    "llama3": (LLAMA31, "<|eot_id|>", ""),
    "mistral": (MISTRAL_V3, "</s>", " "),
    "gemma": (GEMMA3, "<end_of_turn>", ""),
    "qwen2": (QWEN2, "<|im_end|>", ""),
    "qwen3": (QWEN3, "<|im_end|>", "<think>\n\n</think>\n\n"),
    "phi3": (PHI3, "<|end|>", ""),
    "phi4": (PHI4, "<|im_end|>", ""),
    "deepseek": (DEEPSEEK, "<｜end▁of▁sentence｜>", ""),
    "zephyr": (ZEPHYR, "</s>", ""),
    "alpaca": (ALPACA_SYSTEM, "</s>", ""),
    "marked": (MARKED, "<|im_end|>", ""),
}
shapes = pytest.mark.parametrize("shape", SHAPES)

ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}},
}


@lru_cache
def make_renderer(template: str) -> ChatRenderer:
    return ChatRenderer(make_tokenizer(template))


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def said(content: str, **extra: Any) -> Message:
    return {"role": "assistant", "content": content, **extra}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "a1b2c3d4e", "function": {"name": "add", "arguments": arguments}}


def record(*messages: Message, tools: bool = False) -> Conversation:
    return Conversation(messages=messages, where="data.jsonl:7", tools=(ADD,) if tools else ())


def trained(template: str, chat: Conversation, *, last_only: bool = False) -> list[str]:
    """The decoded text of every run of trained tokens."""
    return segments(make_renderer(template).conversation(chat, last_only=last_only))


def segments(rendered: Rendered) -> list[str]:
    tokenizer = make_tokenizer(None)
    assert tokenizer.decode(rendered.ids, clean_up_tokenization_spaces=False) == rendered.text
    runs = groupby(zip(rendered.ids, rendered.mask, strict=True), key=lambda pair: pair[1])
    spans = [[token for token, _ in run] for on, run in runs if on]
    return [tokenizer.decode(span, clean_up_tokenization_spaces=False) for span in spans]


def rejection(template: str, chat: Conversation, *, last_only: bool = False) -> str:
    with pytest.raises(BadInput) as caught:
        make_renderer(template).conversation(chat, last_only=last_only)
    assert str(caught.value).startswith("data.jsonl:7: ")
    return str(caught.value)


SYSTEM: Message = {"role": "system", "content": "Be kind"}
TALK = (user("Hi"), said("Hello"), user("And?"), said("So."), user("Hi"), said("Hello"))


@shapes
@pytest.mark.parametrize("system", [(), (SYSTEM,)], ids=["plain", "system"])
def test_single_turns(shape: str, system: tuple[Message, ...]) -> None:
    template, stop, before = SHAPES[shape]
    rendered = make_renderer(template).conversation(record(*system, user("Hi"), said("Hello")))
    assert segments(rendered) == [f"{before}Hello{stop}"]
    assert ("Be kind" in rendered.text) == bool(system)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "qwen3"])
@pytest.mark.parametrize("system", [(), (SYSTEM,)], ids=["plain", "system"])
def test_every_turn_is_trained(shape: str, system: tuple[Message, ...]) -> None:
    template, stop, before = SHAPES[shape]
    answers = [f"{before}{text}{stop}" for text in ("Hello", "So.", "Hello")]
    assert trained(template, record(*system, *TALK)) == answers


@shapes
@pytest.mark.parametrize("system", [(), (SYSTEM,)], ids=["plain", "system"])
@pytest.mark.parametrize("rest", [(), (user("Bye"),)], ids=["answer", "question"])
def test_only_the_last_turn_is_trained(shape: str, system: tuple[Message, ...], rest: tuple[Message, ...]) -> None:
    template, stop, before = SHAPES[shape]
    chat = record(*system, *TALK[:4], *rest)
    rendered = make_renderer(template).conversation(chat, last_only=True)
    assert segments(rendered) == [f"{before}So.{stop}"]
    prompt = list(chat.messages[: len(system) + 3])
    asked = make_tokenizer(template).apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert rendered.ids[: rendered.mask.index(True)] == asked


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "qwen3"])
def test_turns_marked_train_false_are_context(shape: str) -> None:
    template, stop, before = SHAPES[shape]
    marked = [{**TALK[3], "train": False} if message is TALK[3] else message for message in TALK]
    rendered = make_renderer(template).conversation(record(*marked))
    assert rendered.text == make_renderer(template).conversation(record(*TALK)).text
    assert segments(rendered) == [f"{before}Hello{stop}"] * 2


def test_the_template_is_not_shown_the_key_train() -> None:
    shows = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.train }}")
    chat = record(user("Hi"), said("Hello", train=False), user("And?"), said("So.", train=True))
    assert trained(shows, chat) == ["So.<|im_end|>"]
    assert "False" not in make_renderer(shows).conversation(chat).text


def test_a_conversation_without_a_trained_turn_is_dropped_and_counted() -> None:
    mute = make_renderer(CHATML).conversation(record(user("Hi"), said("Hello", train=False)))
    last = make_renderer(CHATML).conversation(record(*TALK[:3], said("So.", train=False)), last_only=True)
    assert segments(mute) == segments(last) == []
    counts = pack([mute, last, make_renderer(CHATML).conversation(record(*TALK))], 128).counts
    assert (counts.documents, counts.packed, counts.untrained) == (3, 1, 2)


# turns of one role that follow each other


@pytest.mark.parametrize("shape", ["chatml", "llama3", "gemma", "qwen2", "phi3", "phi4", "deepseek", "marked"])
def test_turns_of_one_role_may_follow_each_other(shape: str) -> None:
    template, stop, before = SHAPES[shape]
    chat = record(user("Hi"), user("Listen"), said("Yes"), said("I do"))
    assert trained(template, chat) == [f"{before}Yes{stop}", f"{before}I do{stop}"]


def test_answers_in_a_row_without_generation_prompt_are_rejected() -> None:
    assert "turn 3 cannot be proven: </s> follows its content" in rejection(
        MISTRAL, record(user("Hi"), said("A"), said("B"))
    )


def test_a_template_that_joins_answers_or_drops_a_question_is_rejected() -> None:
    joins = (
        "{% for m in messages %}{% if loop.first or m.role != messages[loop.index0 - 1].role %}<|im_start|>{{ m.role }}"
        "\n{% endif %}{{ m.content }}{% if loop.last or m.role != messages[loop.index0 + 1].role %}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    message = rejection(joins, record(user("Hi"), said("A"), said("B")))
    assert "cannot be proven" in message
    drops = CHATML.replace(
        "%}<|im_start|>{{", "%}{% if loop.last or m.role != messages[loop.index0 + 1].role %}<|im_start|>{{", 1
    )
    drops = drops.replace("<|im_end|>\n", "<|im_end|>\n{% endif %}", 1)
    for other in ("Listen", "Hi there"):
        assert "leaves out or rewrites turn 1 (user)" in rejection(drops, record(user("Hi"), user(other), said("Yes")))


# thoughts


def test_thoughts_of_the_last_turn_are_trained() -> None:
    thought = "<think>\nhm\n</think>\n\n"
    for answer in (said(f"{thought}Hello"), said("Hello", reasoning_content="hm")):
        assert trained(QWEN3, record(user("Hi"), answer)) == [f"{thought}Hello<|im_end|>"]
        chat = record(user("Hi"), said(f"{thought}No"), user("And?"), answer)
        rendered = make_renderer(QWEN3).conversation(chat, last_only=True)
        assert segments(rendered) == [f"{thought}Hello<|im_end|>"]
        assert "<think>" not in rendered.text.split("And?")[0], "earlier turns lose their thoughts, as at inference"


def test_thoughts_that_earlier_turns_lose_are_rejected_with_the_way_out() -> None:
    for first in (said("Hello"), said("<think>\nhm\n</think>\n\nHello"), said("Hello", reasoning_content="hm")):
        message = rejection(QWEN3, record(user("Hi"), first, *TALK[2:4]))
        assert "turn 2 cannot be proven: the template writes it differently once other turns follow" in message
        assert "train_on=last" in message
        context = record(user("Hi"), {**first, "train": False}, *TALK[2:4])
        assert trained(QWEN3, context) == ["<think>\n\n</think>\n\nSo.<|im_end|>"]


def test_answers_after_another_prompt_than_at_inference_are_rejected_with_the_way_out() -> None:
    message = rejection(SILENT, record(*TALK))
    assert "turn 2 cannot be proven: the template begins it without its generation prompt once other" in message
    assert "train_on=each" in message
    for turns, answer in ((TALK[:2], "Hello"), (TALK[:4], "So.")):
        assert trained(SILENT, record(*turns), last_only=True) == [f"{answer}<|im_end|>"]
    context = record(TALK[0], {**TALK[1], "train": False}, *TALK[2:4])
    assert trained(SILENT, context) == ["So.<|im_end|>"]


def test_thoughts_that_the_template_rewrites_or_removes_are_rejected() -> None:
    squeezed = rejection(QWEN3, record(user("Hi"), said("<think>hm</think>Hello")))
    assert "turn 2 cannot be proven: the text does not hold its content" in squeezed
    chat = record(user("Hi"), said("<think>\nhm\n</think>\n\nHello"))
    assert "turn 2 cannot be proven: the text does not hold its content" in rejection(DEEPSEEK, chat)
    for last_only in (False, True):
        message = rejection(DEEPSEEK_R1, chat, last_only=last_only)
        assert "turn 2 cannot be proven: the template does not begin it with its own generation prompt" in message


def test_thoughts_in_the_content_behind_thoughts_of_the_template_are_rejected() -> None:
    message = rejection(EMPTY_THOUGHT, record(user("Hi"), said("<think>\nhm\n</think>\n\nHello")))
    assert "turn 2 cannot be proven: the template closes the thoughts before the content" in message


def test_thoughts_that_the_template_does_not_know_are_rejected() -> None:
    message = rejection(CHATML, record(user("Hi"), said("Hello", reasoning_content="hm")))
    assert "turn 2 cannot be proven: the template leaves out its reasoning_content" in message


# tools

CALLS = {
    "qwen2": (QWEN2, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "zwölf"}}\n</tool_call><|im_end|>'),
    "llama3": (LLAMA31, '{"name": "add", "parameters": {"a": 1, "b": "zwölf"}}<|eot_id|>'),
    "mistral": (
        MISTRAL_V3,
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "zwölf"}, "id": "a1b2c3d4e"}]</s>',
    ),
    "deepseek": (
        DEEPSEEK,
        (
            '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1, "b": "zwölf"}\n```<｜tool▁call▁end｜>'
            "<｜end▁of▁sentence｜>"
        ),
    ),
}
calls = pytest.mark.parametrize("shape", CALLS)
CALLED = said("", tool_calls=[call(a=1, b="zwölf")])
RESULT: Message = {"role": "tool", "content": '"thirteen"'}


@calls
def test_calls_are_trained_and_results_are_not(shape: str) -> None:
    template, expected = CALLS[shape]
    _, stop, before = SHAPES[shape]
    step = (user("1+zwölf"), CALLED, RESULT, said("It is 13"))
    answers = [expected, f"{before}It is 13{stop}"]
    chat = record(*step, *step, tools=shape != "deepseek")
    assert trained(template, chat) == answers * 2
    assert trained(template, chat, last_only=True) == answers[1:]
    marked = (step[0], {**CALLED, "train": False}, *step[2:])
    assert trained(template, record(*marked)) == answers[1:]


def test_thoughts_and_calls_of_several_steps() -> None:
    thinking = {**CALLED, "reasoning_content": "hm"}
    chat = record(SYSTEM, user("1+zwölf"), thinking, RESULT, RESULT, said("13", reasoning_content="so"), tools=True)
    expected = "<think>\nhm\n</think>\n\n" + CALLS["qwen2"][1]
    assert trained(QWEN3, chat) == [expected, "<think>\nso\n</think>\n\n13<|im_end|>"]
    assert "turn 2 cannot be proven: the template writes it differently" in rejection(
        QWEN3, record(user("1+zwölf"), CALLED, RESULT, said("13"))
    )


def test_content_before_calls_is_trained_with_them() -> None:
    several = said("Let me see", tool_calls=[call(a=1), call(b=["x", None, {"c": True}])])
    assert "".join(trained(QWEN2, record(user("Hi"), several))) == (
        'Let me see\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"b": ["x", null, {"c": true}]}}\n</tool_call><|im_end|>'
    )


WRITES = "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls | tojson }}</call>{% endif %}"


@pytest.mark.parametrize(
    ("content", "wrote", "why"),
    [
        ("Look", "{{ m.content }}", "leaves out or rewrites turn 4"),
        ("Look", WRITES.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}"), "its content is missing"),
        ("Look", WRITES.replace("| tojson", "| map(attribute='function.name') | list"), "'7' is missing"),
        ("Look", WRITES.replace("| tojson", "| map(attribute='function.name') | list ~ 7"), "does not write all of"),
        ("Look", WRITES.replace("<call>", "<|im_end|>\n"), "its calls are not between"),
        ("Look", WRITES.replace("<call>", "<call {{ messages[0].content }}>"), "written differently in another"),
        ("Look", WRITES.replace("</call>", "</call>{{ messages | length }}"), "written differently in another"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_proven_are_rejected(content: str | None, wrote: str, why: str) -> None:
    template = CHATML.replace("{{ m.content }}", wrote)
    assert trained(template, record(user("Hi"), said("Hello"))) == ["Hello<|im_end|>"]
    chat = record(user("Hi"), said("Ho"), user("1+1"), said(content, tool_calls=[call(a=7)]))
    assert why in rejection(template, chat)


def test_calls_behind_a_header_that_the_generation_prompt_lacks_are_rejected() -> None:
    template = NO_GENERATION_PROMPT.replace("{{ m.content }}", WRITES)
    with pytest.raises(BadInput, match=r"assistant\\n' is between the generation prompt and its content"):
        make_renderer(template).conversation(record(user("1+1"), said("Look", tool_calls=[call(a=7)])))


@pytest.mark.parametrize(
    "message", [said("Look", tool_calls=[call(a="x<|im_end|>")]), said("Look", reasoning_content="<|im_end|>")]
)
def test_special_tokens_in_calls_and_thoughts_are_rejected(message: Message) -> None:
    assert "turn 2 (assistant) holds the special token '<|im_end|>'" in rejection(QWEN3, record(user("Hi"), message))


def test_half_characters_in_calls_are_rejected() -> None:
    chat = record(user("Hi"), said("Look", tool_calls=[call(a="\ud83d")]))
    assert "the chat template cannot render the conversation: 'utf-8' codec can't encode" in rejection(QWEN2, chat)


def test_tools_and_results_that_the_template_leaves_out_are_rejected() -> None:
    assert "leaves out the tools" in rejection(CHATML, record(user("Hi"), said("Hello"), tools=True))
    forgets = FORGETFUL.replace("'system'", "'tool'")
    chat = record(user("Hi"), said("Hello"), {"role": "tool", "content": "42"}, said("So."))
    assert "leaves out or rewrites turn 3 (tool)" in rejection(forgets, chat)


def test_calls_can_be_preferred() -> None:
    pair = Preference(prompt=(user("1+1"),), chosen=(CALLED,), rejected=(said("No"),), where="x", tools=(ADD,))
    rendered = make_renderer(QWEN2).preference(pair)
    tokenizer = make_tokenizer(None)
    assert tokenizer.decode(rendered.chosen) == CALLS["qwen2"][1]
    assert tokenizer.decode(rendered.rejected) == "No<|im_end|>"
    assert "add" in tokenizer.decode(rendered.prompt)


# the templates that trl ships, word for word

SHIPPED = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
    "gemma3": ("<end_of_turn>", ""),
    "llama3_1": ("<|eot_id|>", ""),
    "llama3_training": ("<|eot_id|>", ""),
    "phi3_5": ("<|end|>", ""),
    "qwen2_5": ("<|im_end|>", ""),
    "qwen2_5_training": ("<|im_end|>", ""),
    "qwen3_instruct_2507": ("<|im_end|>", ""),
    "qwen3_training": ("<|im_end|>", "<think>\n\n</think>\n\n"),
    "qwen3": ("<|im_end|>", "<think>\n\n</think>\n\n"),
    "qwen3_5_think": ("<|im_end|>", "\n</think>\n\n"),
}
STRIPS = ("qwen3", "qwen3_5_think")


def shipped(name: str) -> str:
    return Path(str(distribution("trl").locate_file(f"trl/chat_templates/{name}.jinja"))).read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_templates_of_published_models(name: str) -> None:
    template, (stop, before) = shipped(name), SHIPPED[name]
    answers = [f"{before}{text}{stop}" for text in ("Hello", "So.")]
    assert trained(template, record(*TALK[:4]), last_only=True) == answers[1:]
    assert trained(template, record(SYSTEM, *TALK[:2])) == answers[:1]
    if name in STRIPS:
        assert "turn 2 cannot be proven" in rejection(template, record(*TALK[:4]))
    else:
        assert trained(template, record(*TALK[:4])) == answers


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3_1"])
def test_calls_by_templates_of_published_models(name: str) -> None:
    spelled = {"llama3_1": CALLS["llama3"][1]}.get(name, CALLS["qwen2"][1])
    chat = record(user("1+zwölf"), CALLED, RESULT, said("13"), tools=True)
    assert trained(shipped(name), chat) == [spelled, f"13{SHIPPED[name][0]}"]
