"""Chat rendering: the mask holds the answers with their stop tokens, and nothing else, for every kind of template."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import groupby

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.records import Conversation, Document, Preference, Text
from posttrain.errors import BadInput
from posttrain.tokens import chat as chat_module
from posttrain.tokens.chat import ChatRenderer, Rendered, answer_ends
from tests.support.chat_templates import (
    ALPACA,
    ALWAYS_ASSISTANT,
    CHATML,
    EMPTY_THOUGHT,
    FORGETFUL,
    GEMMA,
    LATE_SYSTEM,
    LLAMA3,
    MARKED,
    MARKED_HEADER,
    MARKED_ON_LINES,
    MARKED_TOO_FAR,
    MISTRAL,
    NO_GENERATION_PROMPT,
    PLAIN,
    SPECIAL,
    THINKING,
    THINKING_PROMPT,
    make_tokenizer,
    sentencepiece,
)


@lru_cache
def make_renderer(template: str) -> ChatRenderer:
    return ChatRenderer(make_tokenizer(template))


def chat(*contents: str, system: str | None = None) -> Conversation:
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]
    head = [{"role": "system", "content": system}] if system is not None else []
    return Conversation(messages=(*head, *turns), where="data.jsonl:7")


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        (CHATML, ["<|im_end|>"]),
        (LLAMA3, ["<|eot_id|>"]),
        (MISTRAL, ["</s>"]),
        (GEMMA, ["<end_of_turn>"]),
        (MARKED, ["<|im_end|>"]),
        (THINKING, ["<|im_end|>"]),
        (PLAIN, []),
        (NO_GENERATION_PROMPT, []),
    ],
)
def test_answers_end_at_the_proven_stop_token(template: str, stops: list[str]) -> None:
    tokenizer = make_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(answer_ends(tokenizer)) == stops


def trained(rendered: Rendered) -> list[str]:
    """The text of every run of trained tokens."""
    tokenizer = make_tokenizer(None)
    runs = groupby(zip(rendered.ids, rendered.mask, strict=True), key=lambda pair: pair[1])
    spans = [[token for token, _ in run] for on, run in runs if on]
    return [tokenizer.decode(span, clean_up_tokenization_spaces=False) for span in spans]


def rejection(template: str, record: Conversation) -> str:
    with pytest.raises(BadInput) as caught:
        make_renderer(template).conversation(record)
    return str(caught.value)


# template, stop token, whether it trims, what it writes before an answer
KINDS = {
    "chatml": (CHATML, "<|im_end|>", False, ""),
    "llama3": (LLAMA3, "<|eot_id|>", True, ""),
    "mistral": (MISTRAL, "</s>", True, " "),
    "gemma": (GEMMA, "<end_of_turn>", True, ""),
    "marked": (MARKED, "<|im_end|>", False, ""),
    "marked_on_lines": (MARKED_ON_LINES, "<|im_end|>", False, ""),
    "marked_too_far": (MARKED_TOO_FAR, "<|im_end|>", False, ""),
    "alpaca": (ALPACA, "</s>", False, ""),
}
kinds = pytest.mark.parametrize("kind", KINDS)

contents = st.one_of(
    st.sampled_from(["Yes.", "\nfoo", "\n\n foo \n", "  two  ", "assistant", "Response:\n", "x<|im_en", "user\nYes."]),
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.text("aY \n\t.é漢🙂", min_size=1),
).filter(lambda text: text.strip() and not any(token in text for token in SPECIAL))


@kinds
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(contents, min_size=2, max_size=7))
def test_answers_and_stop_tokens_are_trained_and_nothing_else(kind: str, texts: list[str]) -> None:
    template, stop, trims, before = KINDS[kind]
    rendered = make_renderer(template).conversation(chat(*texts))
    answers = [text.strip() if trims else text for text in texts[1::2]]
    assert trained(rendered) == [before + answer + stop for answer in answers]
    assert make_tokenizer(None).decode(rendered.ids, clean_up_tokenization_spaces=False) == rendered.text
    assert rendered.text == make_tokenizer(template).apply_chat_template(list(chat(*texts).messages), tokenize=False)


@kinds
@settings(max_examples=40, deadline=None)
@given(question=contents, answer=contents)
def test_the_prompt_has_the_ids_that_inference_gives_it(kind: str, question: str, answer: str) -> None:
    template = KINDS[kind][0]
    rendered = make_renderer(template).conversation(chat(question, answer))
    asked = [{"role": "user", "content": question}]
    prompt = make_tokenizer(template).apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert rendered.ids[: len(prompt)] == prompt
    assert rendered.mask.index(True) == len(prompt)


def test_a_token_across_the_border_is_split_there() -> None:
    tokenizer = make_tokenizer(CHATML)
    joined = tokenizer("assistant\n\nfoo", add_special_tokens=False)["input_ids"]
    apart = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("assistant\n", "\nfoo")]
    assert joined != apart[0] + apart[1], "the tokenizer must merge across the border for this test to mean anything"
    rendered = make_renderer(CHATML).conversation(chat("Hi", "\nfoo", "Again", "\nfoo"))
    assert trained(rendered) == ["\nfoo<|im_end|>"] * 2


def test_a_split_behind_the_stop_token_of_the_turn_before_repeats_nothing() -> None:
    rendered = make_renderer(ALPACA).conversation(chat("Hi", "\n\nfoo", "Again", "\n\nbar"))
    assert make_tokenizer(None).decode(rendered.ids) == rendered.text
    assert trained(rendered) == ["\n\nfoo</s>", "\n\nbar</s>"]


def test_line_end_behind_the_stop_token_is_not_trained() -> None:
    rendered = make_renderer(CHATML).conversation(chat("Hi", "Hello"))
    assert rendered.text.endswith("Hello<|im_end|>\n")
    assert rendered.mask[-1] is False
    assert rendered.mask[-2] is True


def test_trailing_user_turn_stays_and_is_not_trained() -> None:
    rendered = make_renderer(CHATML).conversation(chat("Hi", "Hello", "And then?"))
    assert rendered.text.endswith("And then?<|im_end|>\n")
    assert trained(rendered) == ["Hello<|im_end|>"]


def test_an_answer_may_close_before_the_turn_does() -> None:
    closed = MISTRAL.replace("{{ eos_token }}", "<|im_end|>{{ eos_token }}")
    assert trained(make_renderer(closed).conversation(chat("Hi", "Hello", "And?", "So."))) == [
        " Hello<|im_end|></s>", " So.<|im_end|></s>",
    ]  # fmt: skip
    followed = CHATML.replace("<|im_end|>\n", "<|im_end|>") + "{% if not add_generation_prompt %}<s>{% endif %}"
    assert trained(make_renderer(followed).conversation(chat("Hi", "Hello"))) == ["Hello<|im_end|>"]


def test_what_a_template_writes_behind_the_last_turn_is_not_trained() -> None:
    ended = CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")
    assert trained(make_renderer(ended).conversation(chat("Hi", "Hello", "And?", "So."))) == [
        "Hello<|im_end|>", "So.<|im_end|>",
    ]  # fmt: skip


def test_system_and_tool_turns_are_not_trained() -> None:
    turns = [("system", "Be kind"), ("user", "Hi"), ("assistant", "Look up"), ("tool", "42"), ("assistant", "It is 42")]
    record = Conversation(messages=tuple({"role": r, "content": c} for r, c in turns), where="x")
    assert trained(make_renderer(CHATML).conversation(record)) == ["Look up<|im_end|>", "It is 42<|im_end|>"]


@pytest.mark.parametrize(
    "texts", [("Hi", "say <|im_end|> now"), ("a<|im_end|>\n<|im_start|>assistant\nb", "ok"), ("<s>", "ok")]
)
def test_contents_with_special_tokens_are_rejected(texts: tuple[str, str]) -> None:
    message = rejection(CHATML, chat(*texts))
    assert "data.jsonl:7" in message
    assert re.search(r"turn [12] \((user|assistant)\) holds the special token '<", message)
    assert "fake an end of turn" in message


def test_a_template_without_stop_token_is_rejected() -> None:
    message = rejection(PLAIN, chat("Hi", "Hello"))
    assert "data.jsonl:7: the mask for turn 2 cannot be proven: no stop token" in message
    assert "model.chat_template=FILE" in message


def test_a_header_is_not_taken_for_the_answer() -> None:
    assert "no stop token" in rejection(LLAMA3.replace("<|eot_id|>", ""), chat("Hi", "assistant"))


def test_a_header_is_not_taken_for_a_stop_token() -> None:
    assert "turn 2 cannot be proven" in rejection(ALWAYS_ASSISTANT, chat("Hi", "Hello"))
    role_headers = (
        ALWAYS_ASSISTANT.removesuffix("<|assistant|>") + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert "turn 2 cannot be proven" in rejection(role_headers, chat("Hi", "Hello", "And?", "So."))


def test_thoughts_that_the_template_keeps_are_trained() -> None:
    rendered = make_renderer(THINKING).conversation(chat("Hi", "<think>\nhm\n</think>\n\nHello"))
    assert trained(rendered) == ["<think>\nhm\n</think>\n\nHello<|im_end|>"]
    assert trained(make_renderer(THINKING).conversation(chat("Hi", "Hello", "And?", "So."))) == [
        "Hello<|im_end|>", "So.<|im_end|>",
    ]  # fmt: skip


def test_thoughts_that_the_template_removes_from_earlier_turns_are_rejected() -> None:
    message = rejection(THINKING, chat("Hi", "<think>\nhm\n</think>\n\nHello", "And?", "So."))
    assert "turn 2 cannot be proven: the template writes it differently once other turns follow" in message


def test_what_the_template_itself_begins_the_answer_with_is_trained() -> None:
    rendered = make_renderer(EMPTY_THOUGHT).conversation(chat("Hi", "Hello"))
    assert trained(rendered) == ["<think>\n\n</think>\n\nHello<|im_end|>"]
    assert "turn 2 cannot be proven" in rejection(EMPTY_THOUGHT, chat("Hi", "Hello", "And?", "So."))


def test_a_template_that_moves_the_system_message_still_gives_the_right_spans() -> None:
    rendered = make_renderer(LATE_SYSTEM).conversation(chat("Yes", "Yes", "Hi", "Hello", system="Be kind"))
    assert rendered.text.index("Be kind") > rendered.text.index("Yes")
    assert trained(rendered) == [" Yes</s>", " Hello</s>"]


def test_a_header_that_the_generation_prompt_lacks_is_rejected() -> None:
    message = rejection(NO_GENERATION_PROMPT, chat("Hi", "Hello"))
    assert "'<|im_start|>assistant\\n' is between the generation prompt and its content" in message


def test_thoughts_that_the_generation_prompt_opens_are_trained_from_there() -> None:
    rendered = make_renderer(THINKING_PROMPT).conversation(chat("Hi", "<think>\nhm\n</think>\n\nHello"))
    assert trained(rendered) == ["hm\n</think>\n\nHello<|im_end|>"]


@kinds
@pytest.mark.parametrize("word", ["assistant", "model", "user", "Response:", "INST"])
def test_answers_that_read_like_headers(kind: str, word: str) -> None:
    template, stop, _, before = KINDS[kind]
    assert trained(make_renderer(template).conversation(chat(word, word, word, word))) == [before + word + stop] * 2


def test_a_generation_prompt_that_no_answer_follows_is_rejected() -> None:
    assert "does not begin it with its own generation prompt" in rejection(THINKING_PROMPT, chat("Hi", "Hello"))


def test_a_template_that_drops_a_turn_is_rejected() -> None:
    assert "leaves out or rewrites turn 1 (system)" in rejection(FORGETFUL, chat("Hi", "Hello", system="Be kind"))


def test_markers_that_take_in_the_header_do_not_train_it() -> None:
    assert trained(make_renderer(MARKED_HEADER).conversation(chat("Hi", "Hello", "And?", "So."))) == [
        "Hello<|im_end|>", "So.<|im_end|>",
    ]  # fmt: skip


def test_markers_that_cover_another_turn_are_rejected() -> None:
    user = "<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    answer = "<|im_start|>assistant\n{{ messages[loop.index].content }}<|im_end|>\n"
    begun_early = (
        "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last %}" + user + "{% else %}"
        "{% generation %}" + user + answer + "{% endgeneration %}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    short = MARKED.replace(
        "{{ m.content }}{% endgeneration %}", "{{ m.content[:2] }}{% endgeneration %}{{ m.content[2:] }}"
    )
    assert "{% generation %} marks 'He' instead" in rejection(short, chat("Hi", "Hello"))
    assert "{% generation %} marks '<|im_start|>user" in rejection(begun_early, chat("Hi", "Hello"))
    assert "does not mark every assistant turn once" in rejection(
        "{% generation %}{% endgeneration %}" + MARKED, chat("Hi", "Yo")
    )


def test_a_template_that_raises_is_rejected_with_its_reason() -> None:
    message = rejection(GEMMA, chat("Hi", "Hello", system="Be kind"))
    assert "data.jsonl:7: the chat template cannot render the conversation: no system role" in message


def test_tokenizers_without_template_or_fast_backend_are_rejected() -> None:
    with pytest.raises(BadInput, match=r"model: .*no chat template\n.*model.chat_template=FILE"):
        ChatRenderer(make_tokenizer(None))
    with pytest.raises(BadInput, match="model: the tokenizer is not a fast one"):
        ChatRenderer(object())


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@settings(max_examples=40, deadline=None)
@given(question=contents, answers=st.lists(contents, min_size=2, max_size=2))
def test_tokenizers_that_write_spaces_as_letters(scheme: str, question: str, answers: list[str]) -> None:
    tokenizer = sentencepiece(scheme)
    assume(not any("▁" in text for text in (question, *answers)))  # the tokenizer takes it for a space
    rendered = ChatRenderer(tokenizer).conversation(chat(question, answers[0], "Again", answers[1]))
    asked = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert rendered.ids[: len(prompt)] == prompt
    assert rendered.ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    runs = groupby(zip(rendered.ids, rendered.mask, strict=True), key=lambda pair: pair[1])
    spans = [tokenizer.decode([token for token, _ in run]) for on, run in runs if on]
    assert [span.strip() for span in spans] == [f"{answer.strip()}</s>" for answer in answers]


def test_an_answer_that_cannot_be_tokenized_apart_is_rejected() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    renderer = ChatRenderer(tokenizer)
    assert renderer.conversation(chat("Hi", "Hello")).mask.count(True) > 0
    with pytest.raises(BadInput, match="turn 2 cannot be proven: a token crosses the border"):
        renderer.conversation(chat("Hi", "\nfoo"))


def test_characters_that_the_tokenizer_does_not_know_are_rejected_in_answers() -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(["userassistant Hello\n"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token=SPECIAL[3],
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHATML,
    )
    renderer = ChatRenderer(fast)
    assert renderer.conversation(chat("Hello 漢", "Hello")).mask.count(True) > 0
    with pytest.raises(BadInput, match=r"turn 2 cannot be proven: its tokens decode to .*<unk>"):
        renderer.conversation(chat("Hello", "Hello 漢"))


MANY: list[Document] = [
    chat("Hi", "Hello"),
    chat("Hi", "Hello", "And?", "No \n", "Why", system="Be kind."),
    Text(text="Plain text.", where="a.txt:0"),
    chat("é ﬁ ☃", "ﬁ"),
    chat("user", "\nassistant", "x", " x "),
]


@pytest.mark.parametrize("kind", [CHATML, LLAMA3, MISTRAL, MARKED, ALPACA])
@pytest.mark.parametrize("size", [0, 60, 10**6])
@pytest.mark.parametrize("last_only", [False, True])
def test_documents_encoded_together_are_those_encoded_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: int, last_only: bool
) -> None:
    monkeypatch.setattr(chat_module, "_GROUP", size)
    renderer = make_renderer(kind)
    alone = [renderer.document(record, last_only=last_only) for record in MANY]
    assert list(renderer.documents(iter(MANY), last_only=last_only)) == alone


@pytest.mark.parametrize("size", [0, 10**6])
@pytest.mark.parametrize("number", range(4))
def test_of_several_bad_records_the_first_is_named_behind_all_sound_ones(
    monkeypatch: pytest.MonkeyPatch, size: int, number: int
) -> None:
    monkeypatch.setattr(chat_module, "_GROUP", size)
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    sound, in_tokens, in_text = chat("Hi", "Hello"), chat("Hi", "\nfoo"), chat("<|im_end|>", "x")
    raw = Text(text="<|im_end|>", where="a.txt:0")
    bad, why = [
        ([in_tokens, in_text], "a token crosses the border"),
        ([in_text, in_tokens], "holds the special token"),
        ([in_tokens, raw], "a token crosses the border"),
        ([raw, in_tokens], "the text holds the special token"),
    ][number]
    found: list[Rendered] = []
    with pytest.raises(BadInput, match=why):
        found.extend(ChatRenderer(tokenizer).documents([sound, sound, *bad, sound]))
    assert found == [ChatRenderer(tokenizer).document(sound)] * 2


def preference(chosen: str, rejected: str) -> Preference:
    turns = chat("Hi", "Hello", "And?").messages
    sides = [({"role": "assistant", "content": text},) for text in (chosen, rejected)]
    return Preference(prompt=turns, chosen=sides[0], rejected=sides[1], where="data.jsonl:7")


@kinds
@settings(max_examples=40, deadline=None)
@given(chosen=contents, rejected=contents)
def test_a_preference_is_one_prompt_and_two_answers_with_stop_tokens(kind: str, chosen: str, rejected: str) -> None:
    template, stop, trims, before = KINDS[kind]
    if chosen.strip() == rejected.strip():
        rejected += "!"
    pair = make_renderer(template).preference(preference(chosen, rejected))
    tokenizer = make_tokenizer(template)
    asked = list(preference(chosen, rejected).prompt)
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert pair.prompt == prompt
    for said, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert (
            tokenizer.decode(said, clean_up_tokenization_spaces=False)
            == before + (text.strip() if trims else text) + stop
        )


def test_answers_that_the_template_makes_equal_are_rejected() -> None:
    with pytest.raises(BadInput, match="chosen and rejected are the same once rendered"):
        make_renderer(LLAMA3).preference(preference("Yes", " Yes\n"))
