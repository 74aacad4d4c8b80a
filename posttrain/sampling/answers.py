"""The answers of a model to questions, kept by content: what was written once is not asked again.

    <kept>/answers/<key>/block-00000.json    answers to the first BLOCK questions, whole or not there, with their hash

The key is of the model, the questions' token ids, the settings of sampling and the versions of the libraries. What
was interrupted resumes at its next block.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.artifact import ModelSource
from posttrain.data.records import Conversation, Question
from posttrain.digests import digest_of
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged, Interrupted
from posttrain.sampling.sampler import Answer, Drawing, sample
from posttrain.saved import read_json
from posttrain.tokens.chat import ChatRenderer, answer_ends, decode

BLOCK = 128
"""Answers written at once."""
COMPUTING = ("posttrain", "torch", "transformers", "peft")
"""Distributions whose versions are part of the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A sampled answer as text."""

    text: str
    """Its text without the stop token."""
    ended: bool
    """False when it was cut."""
    tokens: int
    log_prob: float
    """Log-probability of all its tokens at the temperature of sampling, in nats."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Everything that answers depend on beside the questions, and the services of whoever asks."""

    source: ModelSource
    dtype: str
    drawing: Drawing
    kept: Path
    """Folder of what all runs share."""
    part: Callable[[int, int, str], None]
    """Gets the answers done, their total and what they are, after each block."""
    stop_requested: Callable[[], bool]


def ask(questions: Sequence[Question], asking: Asking) -> list[list[Written]]:
    """Return the sampled answers to each question, kept or by the model, which is loaded only where one is missing.

    Raises BadInput for a prompt that cannot be rendered, Interrupted when a stop is requested: the same call resumes.
    """
    from posttrain.model.loading import load_tokenizer

    tokenizer = load_tokenizer(asking.source)
    prompts = prompt_ids(ChatRenderer(tokenizer), questions)
    folder = asking.kept / "answers" / _key(prompts, asking)[:32]
    folder.mkdir(parents=True, exist_ok=True)
    size, model = max(1, BLOCK // asking.drawing.k), None
    ends = stop_ids(tokenizer)
    found: list[list[Written]] = []
    for number, start in enumerate(range(0, len(prompts), size)):
        path = folder / f"block-{number:05d}.json"
        block = _read(path)
        if block is None:
            if asking.stop_requested():
                raise Interrupted("stopped while answers were sampled; run the same command to go on from there")
            model = model or _load(asking)
            own = ends | model_ends(model)
            answers = sample(model, prompts[start : start + size], asking.drawing, own)
            block = [[_written(tokenizer, answer) for answer in group] for group in answers]
            _write(path, block)
            done = min(start + size, len(prompts)) * asking.drawing.k
            asking.part(done, len(prompts) * asking.drawing.k, "answer")
        found += block
    return found


def prompt_ids(renderer: ChatRenderer, questions: Sequence[Question]) -> list[list[int]]:
    """Return the ids of each question up to its answer, as training renders them."""
    found = []
    for question in questions:
        turns = (*question.prompt, {"role": "assistant", "content": "."})
        shown = renderer.conversation(Conversation(messages=turns, where=question.where), last_only=True)
        found.append(shown.ids[: shown.mask.index(True)])
    return found


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer by the tokenizer and its chat template."""
    return frozenset([tokenizer.eos_token_id, *answer_ends(tokenizer)])


def model_ends(model: Any) -> frozenset[int]:
    """Return the tokens that end an answer by the model's own generation settings."""
    from posttrain.engine.attention import causal_model

    ends = causal_model(model).generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def text_of(tokenizer: Any, answer: Answer) -> str:
    """Return the text of an answer without its stop token."""
    return decode(tokenizer, list(answer.ids[:-1] if answer.ended else answer.ids))


def _load(asking: Asking) -> Any:
    from posttrain.model.loading import load_model

    return load_model(asking.source, asking.dtype)


def _written(tokenizer: Any, answer: Answer) -> Written:
    text = text_of(tokenizer, answer)
    return Written(text=text, ended=answer.ended, tokens=len(answer.ids), log_prob=round(sum(answer.log_probs), 6))


def _key(prompts: Sequence[Sequence[int]], asking: Asking) -> str:
    return digest_of(
        {
            "model": asking.source.digest,
            "dtype": asking.dtype,
            "prompts": [list(ids) for ids in prompts],
            "drawing": asdict(asking.drawing),
            "block": BLOCK,
            "versions": {name: version(name) for name in COMPUTING},
        }
    )


def _write(path: Path, block: Sequence[Sequence[Written]]) -> None:
    answers = [[asdict(answer) for answer in group] for group in block]
    replace_text(path, json.dumps({"sha256": digest_of(answers), "answers": answers}))


def _read(path: Path) -> list[list[Written]] | None:
    """Return a kept block; None when there is none, or when it is not what was written."""
    try:
        values = read_json(path)
        if values["sha256"] != digest_of(values["answers"]):
            return None
        return [[Written(**answer) for answer in group] for group in values["answers"]]
    except (FileNotFoundError, ArtifactDamaged, LookupError, TypeError, ValueError):
        return None
