"""Likelihoods of answers in chats: those of the ids that training renders, for every template and tokenizer."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from posttrain.config.schema import GateTask, Role
from posttrain.data.records import Conversation
from posttrain.errors import BadInput
from posttrain.scoring import plugin
from posttrain.scoring.cache import Blocks
from posttrain.scoring.harness.requests import prepare_task
from posttrain.scoring.harness.responder import TransformersResponder
from posttrain.scoring.harness.scoring import answer
from posttrain.tokens.chat import ChatRenderer
from posttrain.tokens.codec import without_space
from tests.support import chat_templates as kinds
from tests.support.tiny import tiny_llama

(FOLDER,) = plugin.register_eval_tasks()
CHAT = (
    {"role": "user", "content": "Say hello"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and again?"},
)
TEXTS = (
    "Yes.",
    "hello world",
    "one\ntwo\n\nthree",
    "  padded \n",
    "né 日本 42",
    "- The user asks,\n",
    "<think>\nhm\n</think>\n\nNo.",
)
TEMPLATES = (
    "CHATML", "LLAMA3", "MISTRAL", "GEMMA", "MARKED", "MARKED_ON_LINES", "ALPACA", "EMPTY_THOUGHT", "THINKING_PROMPT",
    "QWEN2", "QWEN3", "LLAMA31", "MISTRAL_V3", "GEMMA3", "PHI3", "PHI4", "DEEPSEEK", "ZEPHYR",
)  # fmt: skip


@cache
def model() -> Any:
    return tiny_llama(vocab_size=1024).double()


def tokenizer_of(kind: str) -> Any:
    if kind in ("first", "always"):
        return kinds.sentencepiece(kind)
    tokenizer = kinds.make_tokenizer(getattr(kinds, kind))
    if kind.startswith(("CHATML", "MARKED", "QWEN", "THINKING", "EMPTY", "PHI4")):
        tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def expected(tokenizer: Any, chat: Sequence[dict[str, str]]) -> tuple[float, int]:
    """Return the log-likelihood of the last answer without its stop, and its bytes, from the masks of training."""
    rendered = ChatRenderer(tokenizer).conversation(Conversation(messages=tuple(chat), where="x"), last_only=True)
    ids = torch.tensor([rendered.ids])
    with torch.no_grad():
        chosen = model()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    trained = [place for place, is_trained in enumerate(rendered.mask) if is_trained]
    said = tokenizer.decode([rendered.ids[place] for place in trained])
    while rendered.ids[trained[-1]] in tokenizer.all_special_ids or not tokenizer.decode(rendered.ids[trained[-1]]):
        trained.pop()
    content = chat[-1]["content"]
    # A template trims its content, or begins it in the prompt.
    content = next(text for text in (content, content.strip(), content.strip()[8:]) if text in said)
    return float(sum(chosen[place - 1] for place in trained)), len(content.encode())


def trainable(tokenizer: Any) -> list[str]:
    """Return the texts that training takes as answers with this template."""
    found = []
    for text in TEXTS:
        with contextlib.suppress(BadInput):
            expected(tokenizer, [*CHAT, {"role": "assistant", "content": text}])
            found.append(text)
    assert found
    return found


def scores(tokenizer: Any, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> list[dict[str, float]]:
    """Return the metrics of every row, through a gate's own way from the file to the score."""
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    metric = {"held_out_responses": "bits_per_byte", "held_out_preferences": "acc_norm"}[name]
    task = GateTask(role=Role.lift, metric=metric, task=str(FOLDER / f"{name}.yaml"), data="rows.jsonl", chat=True)
    prepared = prepare_task("mine", task, tokenizer, 0)
    responder = TransformersResponder(model(), tokenizer, 4)
    blocks = Blocks(Path(f"{len(list(Path().iterdir()))}.answers"), "key", 4)
    found = answer(prepared, responder, blocks, "candidate", "digest", 0, lambda done, total: None)
    return [dict(row.metrics) for row in found]


@pytest.mark.parametrize("kind", [*TEMPLATES, "first", "always"])
def test_bits_per_byte_are_those_of_the_trained_tokens_before_the_stop(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    chats = [[*CHAT, {"role": "assistant", "content": text}] for text in trainable(tokenizer)]
    found = scores(tokenizer, "held_out_responses", [{"messages": chat} for chat in chats])
    for chat, metrics in zip(chats, found, strict=True):
        likelihood, size = expected(tokenizer, chat)
        assert metrics["bits_per_byte"] == pytest.approx(-likelihood / math.log(2) / size, rel=1e-6), chat[-1]


@pytest.mark.parametrize("kind", ["CHATML", "LLAMA3", "MISTRAL", "ALPACA", "first"])
def test_the_preferred_answer_wins_by_its_own_cost_for_each_of_its_own_characters(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    texts = [text for text in trainable(tokenizer) if text.isascii()][:4]  # so that a character is a byte
    pairs = [(one, other) for one in texts for other in texts if one != other]
    rows = [{"prompt": list(CHAT), "chosen": one, "rejected": other} for one, other in pairs]
    found = [metrics["acc_norm"] for metrics in scores(tokenizer, "held_out_preferences", rows)]

    def cost(text: str) -> float:
        likelihood, size = expected(tokenizer, [*CHAT, {"role": "assistant", "content": text}])
        return -likelihood / size

    assert found == [float(cost(one) < cost(other)) for one, other in pairs]
    assert 0 < sum(found) < len(found)


CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
fewshot_config:
  samples: [{question: "one?", choices: ["a", "b"], label: 0}, {question: "2?", choices: ["a", "b"], label: 1}]
num_fewshot: 2
description: Short.
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.parametrize("kind", ["CHATML", "LLAMA3", "ALPACA", "GEMMA", "ZEPHYR", "first"])
@pytest.mark.parametrize("prefix", ["", "Answer:", "It is "])
def test_choices_follow_their_examples_and_the_beginning_that_a_task_gives(kind: str, prefix: str) -> None:
    """As training renders the whole conversation; GEMMA rejects a system message, which lm_eval then leaves out."""
    tokenizer = tokenizer_of(kind)
    Path("rows.jsonl").write_text(json.dumps({"question": "Who?", "choices": ["Yes.", "hello\n"], "label": 1}) + "\n")
    Path("choose.yaml").write_text(CHOOSE + (f'gen_prefix: "{prefix}"\n' if prefix else ""))
    task = GateTask(role=Role.lift, metric="acc_norm", task="choose.yaml", chat=True)
    (question,) = prepare_task("mine", task, tokenizer, 0).questions
    assert len(question.requests) == 2
    for request, choice in zip(question.requests, ["Yes.", "hello\n"], strict=True):
        assert request.prompt_ids == tokenizer(request.args[0], add_special_tokens=False).input_ids
        assert without_space(tokenizer.decode(request.answer_ids)) == choice.strip()
        shown = tokenizer.decode([*request.prompt_ids, *request.answer_ids])
        assert shown.rstrip().endswith(f"{prefix.strip()} {choice.strip()}" if prefix else choice.strip())
    trims = kind in ("LLAMA3", "GEMMA", "first")
    assert question.doc["choices"] == ["Yes.", "hello" if trims else "hello\n"]


GENERATE = """
task: told
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 2, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def beginning(named: bool = True) -> Any:
    """A tokenizer that begins every text with a token."""
    core = Tokenizer.from_str(kinds.backend().to_str())
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>" if named else None, eos_token="<|eot_id|>", pad_token="</s>",
        additional_special_tokens=kinds.SPECIAL[1:],
    )  # fmt: skip


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", ["LLAMA3", "CHATML"])
def test_a_text_is_written_after_the_ids_of_training(
    kind: str, named: bool, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer begins every text with a token, which the template writes or leaves out."""
    tokenizer = beginning(named)
    tokenizer.chat_template = getattr(kinds, kind).replace("{{ bos_token }}", "<s>")
    Path("rows.jsonl").write_text(json.dumps({"question": "Who?", "answer": "I."}) + "\n")
    Path("told.yaml").write_text(GENERATE)
    asked: list[list[int]] = []

    def generate(self: Any, context: Any, *rest: Any, **options: Any) -> Any:
        asked.extend(context.tolist())
        return context

    monkeypatch.setattr(TransformersResponder, "_model_generate", generate)
    task = GateTask(role=Role.lift, metric="exact_match", task="told.yaml", chat=chat)
    prepared = prepare_task("mine", task, tokenizer, 0)
    responder = TransformersResponder(model(), tokenizer, 4)
    answer(prepared, responder, Blocks(Path("x.answers"), "key", 4), "candidate", "digest", 0, lambda done, total: None)
    turn = [{"role": "user", "content": "Who?"}]
    trained = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert asked == [trained if chat else tokenizer("Who?").input_ids]


LIKELIHOOD = """
task: told
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["I.", "You."]
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def test_answers_do_not_depend_on_what_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chats, plain texts, texts that another task or block asked already, likelihoods: each as if asked alone."""
    tokenizer = beginning()
    tokenizer.chat_template = kinds.LLAMA3
    asked: list[list[int]] = []

    def watched(kind: str) -> None:
        original = getattr(TransformersResponder, kind)

        def call(self: Any, *given: Any, **options: Any) -> Any:
            asked.extend((given[0] if given else options["context"]).tolist())
            return original(self, *given, **options)

        monkeypatch.setattr(TransformersResponder, kind, call)

    watched("_model_call")
    watched("_model_generate")
    tasks = []
    for name, text, questions, chat in (
        ("plain", GENERATE, ["Who?", "Who is it?", "Who was it?", "Who?"], False),
        ("chat", GENERATE, ["Who?", "Who else?"], True),
        ("fewer", GENERATE, ["Who is it?", "Why?", "Who was it?"], False),
        ("likelihood", LIKELIHOOD, ["Who?", "Who is it?"], False),
    ):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"question": q, "answer": "I."}) + "\n" for q in questions))
        Path(f"{name}.yaml").write_text(text.replace("rows.jsonl", f"{name}.jsonl"))
        metric = "acc" if text is LIKELIHOOD else "exact_match"
        task = GateTask(role=Role.lift, metric=metric, task=f"{name}.yaml", chat=chat)
        tasks.append(prepare_task(name, task, tokenizer, 0))

    def answers(task: Any, responder: Any) -> tuple[list[list[int]], Any]:
        asked.clear()
        blocks = Blocks(Path(f"{len(list(Path().iterdir()))}.answers"), "key", 2)
        answer(task, responder, blocks, "candidate", "digest", 0, lambda *_, **__: None)
        return list(asked), blocks.read()

    alone = [answers(task, TransformersResponder(model(), tokenizer, 2)) for task in tasks]
    assert all(ids and read for ids, read in alone)
    for order in (tasks, tasks[::-1]):
        responder = TransformersResponder(model(), tokenizer, 2)
        together = {task.name: answers(task, responder) for task in order}
        for task, expected_of in zip(tasks, alone, strict=True):
            assert together[task.name] == expected_of, task.name


@pytest.mark.parametrize(
    ("kind", "text", "what"),
    [
        ("CHATML", "a<|im_end|>b", "holds the special token"),
        ("THINKING_PROMPT", "Yes.", "does not begin it with its own generation prompt"),
    ],
)
def test_an_answer_that_training_could_not_render_is_named(kind: str, text: str, what: str) -> None:
    chats = [[*CHAT, {"role": "assistant", "content": each}] for each in ("<think>\nhm\n</think>\n\nNo.", text)]
    with pytest.raises(BadInput, match=what) as caught:
        scores(tokenizer_of(kind), "held_out_responses", [{"messages": chat} for chat in chats])
    assert caught.value.problems[0].where == "tasks.mine, document 1"
