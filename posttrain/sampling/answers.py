"""The answers of a model to questions, kept by content: what was written once is not asked again.

    <kept>/answers/<key>/block-00000.json    answers to the first questions, whole or not there, with their hash

The key is of the model, the questions' token ids, the settings of sampling and the versions of what writes. What was
interrupted resumes at its next block. A block is written by itself, whoever writes it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.artifact import ModelSource
from posttrain.config.on_policy import BLOCK, OnPolicy, SamplingBackend
from posttrain.data.records import Conversation, Question
from posttrain.digests import digest_of
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged, Interrupted
from posttrain.model.vllm_process import find_command
from posttrain.sampling import vllm
from posttrain.sampling.sampler import Answer, Drawing, sample
from posttrain.saved import read_json
from posttrain.tokens.chat import ChatRenderer, answer_ends
from posttrain.tokens.codec import decode

COMPUTING = ("posttrain", "torch", "transformers", "peft")
"""Distributions whose versions are part of the key."""
Write = Callable[[Sequence[Sequence[int]]], list[list[Answer]]]
"""Writes the answers to a block of prompts."""


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
class Blocks:
    """Answers in blocks of whole questions, each in a file of its own."""

    folder: Path
    prompts: Sequence[Sequence[int]]
    size: int
    """Questions of a block."""

    def numbers(self) -> range:
        """Return the numbers of all blocks."""
        return range(-(-len(self.prompts) // self.size))

    def missing(self) -> list[int]:
        """Return the numbers of the blocks that are not written, or damaged."""
        return [number for number in self.numbers() if self.read(number) is None]

    def part(self, number: int) -> Sequence[Sequence[int]]:
        """Return the prompts of a block."""
        return self.prompts[number * self.size : (number + 1) * self.size]

    def read(self, number: int) -> list[list[Written]] | None:
        """Return a kept block; None when there is none, or when it is not what was written."""
        try:
            values = read_json(self._path(number))
            if values["sha256"] != digest_of(values["answers"]):
                return None
            return [[Written(**answer) for answer in group] for group in values["answers"]]
        except (FileNotFoundError, ArtifactDamaged, LookupError, TypeError, ValueError):
            return None

    def write(self, number: int, block: Sequence[Sequence[Written]]) -> None:
        """Keep a block."""
        answers = [[asdict(answer) for answer in group] for group in block]
        replace_text(self._path(number), json.dumps({"sha256": digest_of(answers), "answers": answers}))

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.json"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Everything that answers depend on beside the questions, and the services of whoever asks."""

    source: ModelSource
    base: ModelSource
    """The weights under it."""
    dtype: str
    """Number format in which the model is loaded."""
    drawing: Drawing
    command: Sequence[str] = ()
    """Words that begin vLLM; none where a model in this process answers."""
    processes: Callable[[Blocks, Sequence[int], Asking, Callable[[int], None]], None] | None = None
    """Processes that write missing blocks in place of this one, where that pays."""
    kept: Path
    """Folder of what all runs share."""
    part: Callable[[int, int, str], None]
    """Gets the answers that are kept, all of them and what they are, after each block."""
    stop_requested: Callable[[], bool]

    @classmethod
    def of(
        cls, settings: OnPolicy, where: str, words: str | None = None, *, source: ModelSource, dtype: str, **others: Any
    ) -> Asking:
        """Return the one of these settings; ``words`` begin vLLM, by default the environment's.

        ``dtype`` is the number format of the weights.

        Raises BadInput at ``where`` when there is no vLLM to answer.
        """
        from posttrain.engine.arithmetic import choose_inference
        from posttrain.model.loading import number_format

        drawing = Drawing(
            k=settings.k, temperature=settings.temperature, max_tokens=settings.max_tokens, seed=settings.seed
        )
        by_vllm = settings.backend is SamplingBackend.vllm
        command = find_command(words, where) if by_vllm else ()
        if not by_vllm:
            dtype = number_format(dtype, choose_inference(dtype, source))
        return cls(drawing=drawing, command=command, source=source, dtype=dtype, **others)


def ask(questions: Sequence[Question], asking: Asking) -> list[list[Written]]:
    """Return the sampled answers to each question, kept or by the model, which is loaded only where one is missing.

    Raises BadInput for a prompt that cannot be rendered, Interrupted when a stop is requested or vLLM ends: the same
    call resumes.
    """
    from posttrain.model.loading import load_tokenizer

    tokenizer = load_tokenizer(asking.source)
    prompts = prompt_ids(ChatRenderer(tokenizer), questions)
    size = max(1, (vllm.BLOCK if asking.command else BLOCK) // asking.drawing.k)
    folder = asking.kept / "answers" / _key(prompts, size, asking)[:32]
    folder.mkdir(parents=True, exist_ok=True)
    blocks = Blocks(folder=folder, prompts=prompts, size=size)
    missing = blocks.missing()
    total = len(prompts) * asking.drawing.k
    done = total - sum(len(blocks.part(number)) for number in missing) * asking.drawing.k

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        asking.part(done, total, "answer")

    if missing and asking.processes is not None and not asking.command:
        asking.processes(blocks, missing, asking, wrote)
        missing = blocks.missing()
    if missing:
        with writing(asking, tokenizer) as write:
            write_blocks(blocks, missing, write, tokenizer, asking, wrote)
    return [group for number in blocks.numbers() for group in _found(blocks, number)]


def write_blocks(
    blocks: Blocks,
    numbers: Iterable[int],
    write: Write,
    tokenizer: Any,
    asking: Asking,
    wrote: Callable[[int], None],
) -> None:
    """Write blocks; ``wrote`` gets the number of answers of each. Raises Interrupted when a stop is requested."""
    for number in numbers:
        if asking.stop_requested():
            raise Interrupted("stopped while answers were sampled")
        groups = write(blocks.part(number))
        blocks.write(number, [[_written(tokenizer, answer) for answer in group] for group in groups])
        wrote(len(groups) * asking.drawing.k)


def computing() -> dict[str, str]:
    """Return the versions of the libraries that answers depend on."""
    return {each: version(each) for each in COMPUTING}


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

    return _as_ids(causal_model(model).generation_config.eos_token_id)


def folder_ends(weights: Path) -> frozenset[int]:
    """Return the tokens that end an answer by the generation settings in a folder of weights."""
    from transformers import AutoConfig, GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(weights)
    except OSError:
        found = GenerationConfig.from_model_config(AutoConfig.from_pretrained(weights))
    return _as_ids(found.eos_token_id)


def text_of(tokenizer: Any, answer: Answer) -> str:
    """Return the text of an answer without its stop token."""
    return decode(tokenizer, list(answer.ids[:-1] if answer.ended else answer.ids))


def _as_ids(ends: int | list[int] | None) -> frozenset[int]:
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


@contextlib.contextmanager
def writing(asking: Asking, tokenizer: Any) -> Iterator[Write]:
    """Yield what writes answers, by vLLM or by the model in this process."""
    ends = stop_ids(tokenizer)
    if asking.command:
        with vllm.running(asking.source, asking.base, asking.dtype, asking.command, asking.kept) as server:
            own = ends | folder_ends(server.weights)
            yield lambda prompts: server.write(prompts, asking.drawing, own)
        return
    from posttrain.model.loading import load_model

    model: Any = load_model(asking.source, asking.dtype)
    own = ends | model_ends(model)
    yield lambda prompts: sample(model, prompts, asking.drawing, own)


def _found(blocks: Blocks, number: int) -> list[list[Written]]:
    block = blocks.read(number)
    if block is None:
        raise ArtifactDamaged(f"{blocks.folder}: block {number} cannot be read; run the same command again")
    return block


def _written(tokenizer: Any, answer: Answer) -> Written:
    text = text_of(tokenizer, answer)
    return Written(text=text, ended=answer.ended, tokens=len(answer.ids), log_prob=round(sum(answer.log_probs), 6))


def _key(prompts: Sequence[Sequence[int]], size: int, asking: Asking) -> str:
    return digest_of(
        {
            "model": asking.source.digest,
            "dtype": asking.dtype,
            "prompts": [list(ids) for ids in prompts],
            "drawing": asdict(asking.drawing),
            "block": size,
            "versions": vllm.identity(asking.command) if asking.command else computing(),
        }
    )
