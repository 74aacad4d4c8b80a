"""The texts of a conversation's beginnings, from one rendering: those that the template writes, or none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.records import Conversation
from posttrain.errors import BadInput
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.history import Historian
from posttrain.tokens.texts import ChatTexts
from tests.support import chat_templates
from tests.support.chat_templates import CHATML, make_tokenizer

PUBLISHED = {
    name: text
    for name, text in vars(chat_templates).items()
    if isinstance(text, str) and "messages" in text and name.isupper()
}
LOOP = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
ASKING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TALK = [("user", "What is the first question?"), ("assistant", "It is this."), ("user", "And what is the second one?"),
        ("assistant", "That."), ("user", "Thank you for the answers."), ("assistant", "You are welcome.")]  # fmt: skip


def chat(turns: list[tuple[str, str]]) -> Conversation:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Conversation(messages=messages, where="chat.jsonl:1")


def rendered(template: str, record: Conversation) -> Rendered | str:
    try:
        return ChatRenderer(make_tokenizer(template)).conversation(record)
    except BadInput as error:
        return str(error)


def followed(template: str, record: Conversation) -> bool:
    texts = ChatTexts(make_tokenizer(template))
    with texts.following(record, texts.render(record)) as known:
        return known


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("system", [(), (("system", "Be brief, and say so."),)])
def test_rows_and_errors_are_those_of_rendering_every_beginning(
    name: str, system: tuple[tuple[str, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = chat([*system, *TALK])
    found = rendered(PUBLISHED[name], record)
    with monkeypatch.context() as patch:
        patch.setattr(Historian, "follow", lambda *given: None)
        assert found == rendered(PUBLISHED[name], record)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<|"), max_size=30), min_size=2, max_size=10))
def test_every_beginning_is_what_the_template_writes(said: list[str]) -> None:
    record = chat([("user" if place % 2 == 0 else "assistant", text) for place, text in enumerate(said)])
    texts, plain = (ChatTexts(make_tokenizer(CHATML)) for _ in range(2))
    whole = plain.render(record)
    with texts.following(record, whole) as known:
        assert known
        for count in range(1, len(said) + 1):
            for prompt in (False, True):
                beginning = Conversation(messages=record.messages[:count], where="x")
                assert texts.render(beginning, prompt=prompt) == plain.render(beginning, prompt=prompt)


@pytest.mark.parametrize(
    ("template", "known"),
    [
        (LOOP + ASKING, True),
        ("{{ messages[0].role }}" + LOOP + ASKING, True),
        ("{% set messages = messages[1:] %}" + LOOP + ASKING, True),
        (LOOP.replace("message in", "m in").replace("message.", "m.") + ASKING, True),
        (LOOP.replace("{{ message.role", "{{ loop.index0 }}{{ message.role") + ASKING, True),
        # what depends on messages that are yet to come
        (LOOP.replace("<|im_end|>", "{{ 'x' if loop.last }}<|im_end|>") + ASKING, False),
        (LOOP.replace("<|im_end|>", "{{ loop.length }}<|im_end|>") + ASKING, False),
        (LOOP.replace("<|im_end|>", "{{ loop['last'] }}<|im_end|>") + ASKING, False),
        (LOOP.replace("<|im_end|>", "{{ 'x' if loop.nextitem is defined }}<|im_end|>") + ASKING, False),
        ("{{ messages | length }}" + LOOP + ASKING, False),
        ("{{ messages[-1].role }}" + LOOP + ASKING, False),
        ("{{ messages[1].role }}" + LOOP + ASKING, False),
        (LOOP + "{{ messages[0].role }}" + ASKING, False),
        ("{% for m in messages %}{{ m.role }}{% endfor %}" + LOOP + ASKING, False),
        ("{% if messages %}" + LOOP + "{% endif %}" + ASKING, False),
        ("{{ messages | tojson }}" + LOOP + ASKING, False),
        (LOOP.replace("in messages", "in messages | reverse") + ASKING, False),
        (LOOP.replace("in messages", "in messages if message.role != 'system'") + ASKING, True),
        (LOOP.replace("in messages", "in messages if message.role != 'user'") + ASKING, False),
        ("{% set all %}" + LOOP + "{% endset %}{{ all }}" + ASKING, False),
        # memory
        ("{% set ns = namespace(n=0) %}" + LOOP.replace("{{ message.role", "{% set ns.n = ns.n + 1 %}{{ message.role")
         + "{{ ns.n }}" + ASKING, False),
        ("{% set next = cycler('a', 'b') %}" + LOOP.replace("{{ message.role", "{{ next.next() }}{{ message.role")
         + "{{ next.current }}" + ASKING, False),
    ],
)  # fmt: skip
def test_a_template_is_followed_only_where_it_cannot_know_the_rest(template: str, known: bool) -> None:
    assert followed(template, chat(TALK)) is known


def test_another_way_to_apply_the_template_is_not_followed() -> None:
    tokenizer = make_tokenizer(LOOP + ASKING)
    apply = tokenizer.apply_chat_template
    vars(tokenizer)["apply_chat_template"] = lambda messages, **options: apply(messages, **options)
    texts = ChatTexts(tokenizer)
    with texts.following(chat(TALK), texts.render(chat(TALK))) as known:
        assert not known


def test_the_history_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = ChatRenderer(make_tokenizer(LOOP + ASKING))
    renderer.conversation(chat(TALK))  # proves the generation prompt once
    calls: list[Any] = []
    write = ChatTexts._write

    def counted(self: ChatTexts, *given: Any, **options: Any) -> str:
        calls.append(given)
        return write(self, *given, **options)

    monkeypatch.setattr(ChatTexts, "_write", counted)
    turns = [(("user", f"This is question number {number}."), ("assistant", "Yes.")) for number in range(20)]
    renderer.conversation(chat([turn for pair in turns for turn in pair]))
    assert len(calls) == 1
