"""The six ways in which fine-tuning classically goes wrong, each planted: rejected, or named in a warning."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifact import ModelSource
from posttrain.config.paths import shipped
from posttrain.config.schema import Format, LoraSettings, Method
from posttrain.context import StageContext
from posttrain.data.declines import is_declined, opens_with_decline
from posttrain.data.records import Conversation, Document
from posttrain.data.shapes import to_record
from posttrain.engine.config import TrainOn
from posttrain.errors import BadInput
from posttrain.sft.stage import run
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.markers import family_faults
from posttrain.tokens.masks import MaskProof
from posttrain.tokens.spans import Template
from tests.support import chat_templates
from tests.support.chat_templates import CHATML, GEMMA, LLAMA3, MISTRAL, THINKING_PROMPT, ZEPHYR, make_tokenizer
from tests.support.sft import context, conversations
from tests.support.tiny import TEMPLATE, base_source, tiny_llama, tiny_tokenizer, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return base_source(write_base(tmp_path_factory.mktemp("models") / "base"))


def warnings(stage: StageContext) -> list[str]:
    """What a run of the stage warned of, which its progress was told too."""
    run(stage)
    found = stage.metrics.get("warnings", [])
    notes = [line for line in stage.progress.notes if line.startswith("warning: ")]  # type: ignore[attr-defined]
    assert notes == [f"warning: {line}" for line in found]
    return list(found)


def refusal(stage: StageContext) -> str:
    """The reason for which the stage was rejected, before its first step."""
    with pytest.raises(BadInput) as caught:
        run(stage)
    assert stage.progress.started == (0, 0)  # type: ignore[attr-defined]
    return str(caught.value)


# --- 1. The prompt is not masked --------------------------------------------------------------------------------------


def everything(rendered: Rendered) -> Rendered:
    return replace(rendered, mask=[True] * len(rendered.mask))


def no_stop(rendered: Rendered) -> Rendered:
    last = len(rendered.mask) - 1 - rendered.mask[::-1].index(True)
    return replace(rendered, mask=[trained and place != last for place, trained in enumerate(rendered.mask)])


@pytest.mark.parametrize("harm", [everything, no_stop])
def test_a_wrong_mask_of_one_record_is_rejected(
    base: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Rendered], Rendered]
) -> None:
    sound = ChatRenderer.documents

    def harmed(self: ChatRenderer, records: Iterable[Document], **options: Any) -> Iterator[Rendered]:
        for rendered in sound(self, records, **options):
            yield harm(rendered) if rendered.where == "train.jsonl:7" else rendered

    monkeypatch.setattr(ChatRenderer, "documents", harmed)
    assert "train.jsonl:7: the mask is wrong: " in refusal(context(base, tmp_path))


def test_what_is_left_away_behind_the_last_answer_is_no_fault(base: ModelSource, tmp_path: Path) -> None:
    asked, told = conversations(1)[0].messages
    thanks = {"role": "user", "content": "is"}
    record = Conversation(messages=(asked, {**told, "content": "This is 0."}, thanks), where="train.jsonl:1")
    stage = context(base, tmp_path, records=[record], train_on=TrainOn.last, max_steps=1)
    run(stage)
    assert stage.metrics["steps"] == 1


def test_thoughts_that_the_generation_prompt_opens_are_no_fault() -> None:
    tokenizer = make_tokenizer(THINKING_PROMPT)
    thinking = answer("<think>\nhm\n</think>\n\nHello")
    record = Conversation(messages=({"role": "user", "content": "Hi"}, thinking), where="a:1")
    rendered = ChatRenderer(tokenizer).conversation(record)
    assert MaskProof(tokenizer).fault(record, rendered) is None
    first = rendered.mask.index(True)
    late = replace(rendered, mask=[trained and place > first + 1 for place, trained in enumerate(rendered.mask)])
    assert "is not trained as a whole" in str(MaskProof(tokenizer).fault(record, late))


TALKS = [
    [("user", "Hi"), ("assistant", "Hello")],
    [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hi"), ("user", "Hello  world\n"), ("assistant", "Yes")],
    [("user", "é ﬁ ☃"), ("assistant", "ﬁ")],
    [("user", " x "), ("assistant", " x ")],
]


def test_sound_masks_of_many_templates_have_no_fault() -> None:
    sound = 0
    for template in (
        value for name, value in vars(chat_templates).items() if name.isupper() and isinstance(value, str)
    ):
        tokenizer = make_tokenizer(template)
        for talk in TALKS:
            messages = tuple({"role": role, "content": content} for role, content in talk)
            record = Conversation(messages=messages, where="a:1")
            try:
                rendered = ChatRenderer(tokenizer).conversation(record)
            except BadInput:
                continue  # a shape that is rejected before there is a mask
            sound += 1
            assert MaskProof(tokenizer).fault(record, rendered) is None, (template, talk)
    assert sound > 60


# --- 2. The template is another family's ------------------------------------------------------------------------------


def faults(tokenizer: Any, *ends: int | None) -> list[str]:
    renderer = ChatRenderer(tokenizer)
    return family_faults(tokenizer, [renderer.conversation(record) for record in conversations(3)], ends)


def test_markers_in_a_content_are_not_the_templates() -> None:
    tokenizer = make_tokenizer(CHATML)
    renderer, (one, other) = ChatRenderer(tokenizer), conversations(2)
    quoting = replace(one, messages=({"role": "user", "content": "What is [INST]?"}, one.messages[1]))
    documents = [renderer.conversation(record) for record in (quoting, other)]
    assert family_faults(tokenizer, documents, [tokenizer.convert_tokens_to_ids("<|im_end|>")]) == []


@pytest.mark.parametrize("template", [CHATML, MISTRAL, GEMMA, LLAMA3, ZEPHYR])
def test_a_template_on_the_tokenizer_of_its_family_has_no_fault(template: str) -> None:
    tokenizer = make_tokenizer(template)
    if template == MISTRAL:  # its [INST] is text, which its models were trained on
        assert "[/INST], [INST], which the tokenizer splits" in faults(tokenizer)[0]
        return
    stops = {CHATML: "<|im_end|>", GEMMA: "<end_of_turn>", LLAMA3: "<|eot_id|>", ZEPHYR: "</s>"}
    assert faults(tokenizer, tokenizer.convert_tokens_to_ids(stops[template])) == []


def test_a_stop_token_at_which_the_base_does_not_stop_is_named() -> None:
    (fault,) = faults(make_tokenizer(LLAMA3), None)
    assert "answers end with <|eot_id|>, at which the base does not stop generating" in fault


def test_the_shipped_template_ends_answers_where_its_base_stops() -> None:
    template = (shipped("recipes") / "llama8b_sft_dpo" / "chat_template.jinja").read_text()
    tokenizer = make_tokenizer(template)
    assert faults(tokenizer) == []
    talk = conversations(1)[0]
    rendered = ChatRenderer(tokenizer).conversation(replace(talk, messages=talk.messages * 2))
    assert rendered.text.count("It is 0.</s>") == 2
    assert [token for token, trained in zip(rendered.ids, rendered.mask, strict=True) if trained].count(2) == 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE.replace("] }}|>", "] }}|><|im_sep|>").replace("assistant|>", "assistant|><|im_sep|>"), "<|im_sep|>"),
        (
            TEMPLATE.replace("<|end|>", "<|system|>"),
            "answers end with <|system|>, at which the base does not stop",
        ),
    ],
)
def test_a_run_names_the_fault(base: ModelSource, tmp_path: Path, template: str, expected: str) -> None:
    found = warnings(context(replace(base, chat_template=template), tmp_path, max_steps=1, sequence_length=128))
    assert [line for line in found if line.startswith("model.chat_template: ") and expected in line]


def test_a_template_whose_stop_is_no_token_is_rejected(base: ModelSource, tmp_path: Path) -> None:
    why = refusal(context(replace(base, chat_template=CHATML), tmp_path))
    assert "train.jsonl:1: the mask for turn 2 cannot be proven: no stop token" in why


# --- 3. The adapter matches nothing -----------------------------------------------------------------------------------


def test_an_adapter_that_matches_nothing_is_rejected(base: ModelSource, tmp_path: Path) -> None:
    stage = context(base, tmp_path, lora=LoraSettings(target_modules=["q_proj", "query"]))
    assert "no linear layer of the model is called query" in refusal(stage)


# --- 4. Overfitting after the first epoch -----------------------------------------------------------------------------


def test_overfitting_is_named_with_the_step_to_stop_at(base: ModelSource, tmp_path: Path) -> None:
    told = [
        replace(record, messages=(record.messages[0], answer(f"{i * 7919 % 1000}.")))
        for i, record in enumerate(conversations(30))
    ]
    settings: dict[str, Any] = {"epochs": 12, "lr": 3e-2, "sequence_length": 96}
    stage = replace(context(base, tmp_path, records=told[:6], method=Method.full, **settings), eval_records=told[6:])
    (line,) = [line for line in warnings(stage) if line.startswith("overfitting")]
    step = stage.metrics["eval_loss_lowest_step"]
    assert 0 < step < stage.metrics["steps"]
    assert stage.metrics["eval_loss"] > 1.01 * stage.metrics["eval_loss_lowest"]
    assert f"lowest at step {step} ({stage.metrics['eval_loss_lowest']:.4f})" in line
    assert f"max_steps={step}" in line


# --- 5. The share of refusals grows -----------------------------------------------------------------------------------


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_many_refusals_in_the_data_are_named(base: ModelSource, tmp_path: Path) -> None:
    records = conversations(12)
    records[:3] = [
        replace(each, messages=(each.messages[0], answer("I cannot help with that."))) for each in records[:3]
    ]
    found = warnings(context(base, tmp_path / "a", records=records, max_steps=1))
    assert [line for line in found if line.startswith("data: 25% of the answers are refusals")]
    assert not [line for line in warnings(context(base, tmp_path / "b", max_steps=1)) if "refusals" in line]


def test_a_model_that_learns_to_decline_is_named(base: ModelSource, tmp_path: Path) -> None:
    asked = conversations(40)
    declined = [replace(each, messages=(each.messages[0], answer("I cannot help with that."))) for each in asked[:20]]
    settings: dict[str, Any] = {"method": Method.full, "epochs": 10, "sequence_length": 96}
    helpful = context(base, tmp_path / "helpful", records=asked[:20], **settings)
    run(helpful)
    parent = replace(base, model=helpful.output)
    stage = context(parent, tmp_path / "declining", records=declined[:10], **settings)
    stage = replace(stage, eval_records=[*declined[10:], *asked[20:]])
    (line,) = [line for line in warnings(stage) if "the model learns to decline" in line]
    assert "fell by" in line
    last = stage.progress.steps[stage.metrics["steps"]]  # type: ignore[attr-defined]
    assert last["eval_loss_refusals"] < last["eval_loss_answers"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with that request.", True),
        ("Sorry, I can’t share that.", True),
        ("I apologize, but I will not write that.", True),
        ("I must respectfully decline.", True),
        ("As an AI language model, I don't have feelings.", True),
        ("I'm unable to provide medical advice.", True),
        ("I'm not going to help with that.", True),
        ("I do not feel comfortable writing that.", True),
        ("I can't help but smile at it.", False),
        ("I'm sorry for your loss. Here is what to do.", False),
        ("I cannot recommend this book enough.", False),
        ("The captain said: it cannot be done.", False),
        ("x" * 200 + " I cannot help with that.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_how_they_begin(text: str, expected: bool) -> None:
    assert opens_with_decline(text) is expected


def test_an_answer_that_is_context_is_no_refusal() -> None:
    declined = answer("I cannot help with that.")
    record = Conversation(messages=({"role": "user", "content": "x"}, declined), where="a:1")
    assert is_declined(record)
    assert not is_declined(replace(record, messages=(record.messages[0], {**declined, "train": False})))


def test_what_the_record_says_about_a_refusal_wins_and_the_template_never_sees_it() -> None:
    row = {"messages": [{"role": "user", "content": "x"}, {**answer("Nein, das tue ich nicht."), "refuses": True}]}
    record = to_record(row, Format.auto, "conversations", "a:1")
    assert isinstance(record, Conversation)
    assert is_declined(record)
    said = {**answer("I cannot help with that."), "refuses": False}
    assert not is_declined(replace(record, messages=(record.messages[0], said)))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.keys() | join(' ') }}. {% endfor %}"
    assert Template(tokenizer).render(record) == "role content. role content. "


# --- 6. Tokens that the model has no embeddings for -------------------------------------------------------------------


@pytest.mark.parametrize("in_eval", [False, True])
def test_tokens_without_embeddings_are_rejected(base: ModelSource, tmp_path: Path, in_eval: bool) -> None:
    shutil.copytree(base.model, tmp_path / "small")
    tiny_llama(vocab_size=99).save_pretrained(tmp_path / "small")
    large = [
        replace(each, messages=({"role": "user", "content": "a\nb"}, each.messages[1])) for each in conversations(2)
    ]
    stage = context(base_source(tmp_path / "small"), tmp_path / "run", records=conversations(3) if in_eval else large)
    why = refusal(replace(stage, eval_records=large) if in_eval else stage)
    assert "the model has only 99 embeddings" in why
