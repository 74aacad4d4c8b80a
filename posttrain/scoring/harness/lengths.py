"""Answers of a task that a model's context has no room for: to be scored, or to be generated.

The responders reject them; they are found here before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from transformers import AutoConfig

from posttrain.errors import Problem
from posttrain.scoring.catalogue import is_path
from posttrain.scoring.checks import blaming
from posttrain.scoring.harness.requests import AnswerRequest, build_questions, sample_documents
from posttrain.scoring.harness.tasks import load_leaves
from posttrain.scoring.isolation import muted, quiet

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource
    from posttrain.config.schema import GateTask

MOST_GENERATED = 256
"""Tokens that lm_eval generates where a task names no number."""
TEMPLATE_TOKENS = 64
"""Tokens that a chat template may write behind an answer."""


def too_long(where: str, length: int, context: int) -> Problem:
    """Return the problem of an answer of ``length`` tokens that a context does not hold."""
    what = f"an answer has {length:,} tokens, but the model's context holds {context:,}"
    return Problem(where=where, what=what, fix="Leave its document out of the task's data")


def too_much(where: str, room: int, context: int) -> Problem:
    """Return the problem of a task that generates so many tokens that a context holds no prompt beside them."""
    what = f"the task may generate {room} tokens, but the model's context holds {context}"
    return Problem(where=where, what=what, fix="Set a lower generation_kwargs.max_gen_toks in the task's file")


def check_lengths(
    tasks: Mapping[str, GateTask], seed: int, base: ModelSource, load_tokenizer: Callable[[], Any]
) -> list[Problem]:
    """Return the first document of each task on files here of which an answer has no room in the base's context.

    Registered tasks are not loaded for it: their answers are far shorter than any context.
    """
    own = {name: task for name, task in tasks.items() if task.data is not None or is_path(task.task or name)}
    if not own:
        return []
    tokenizer = load_tokenizer()
    config = AutoConfig.from_pretrained(base.model, local_files_only=True, trust_remote_code=False)
    context = resolve_max_length(config, tokenizer, default=HFLM._DEFAULT_MAX_LENGTH)
    with quiet(), muted():
        return [problem for name, task in own.items() for problem in _faults(name, task, seed, context, tokenizer)]


def _faults(name: str, task: GateTask, seed: int, context: int, tokenizer: Any) -> Iterator[Problem]:
    where, leaves = f"tasks.{name}", load_leaves(name, task)
    for leaf in leaves:
        if leaf.OUTPUT_TYPE == "generate_until":
            room = normalize_gen_kwargs(leaf.config.generation_kwargs, MOST_GENERATED)["max_gen_toks"]
            if room >= context:
                yield too_much(where, room, context)
                return
    with blaming(where, None):
        documents = [list(leaf.eval_docs) for leaf in leaves]
    asked = sample_documents(sum(map(len, documents)), task.limit, seed)
    with blaming(where, None):
        long = {number for number, leaf, doc in _numbered(leaves, documents) if _may_exceed(leaf, doc, context)}
    for question in build_questions(name, task, tokenizer, seed, leaves, documents, long & asked):
        lengths = [_length(request, tokenizer) for request in question.requests]
        if lengths and max(lengths) > context:
            place = question.place or f"document {question.doc_id}"
            yield too_long(f"{where}, {place}", max(lengths), context)
            return


def _numbered(leaves: Sequence[Any], documents: Sequence[Sequence[Any]]) -> Iterator[tuple[int, Any, Any]]:
    pairs = [(leaf, doc) for leaf, docs in zip(leaves, documents, strict=True) for doc in docs]
    for number, (leaf, doc) in enumerate(pairs):
        yield number, leaf, doc


def _may_exceed(leaf: Any, doc: Any, context: int) -> bool:
    """Return whether a scored answer has bytes enough for as many tokens as the context: none has fewer than one."""
    if leaf.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return False
    answers = leaf.doc_to_choice(doc) if leaf.OUTPUT_TYPE == "multiple_choice" else [leaf.doc_to_target(doc)]
    return any(len(str(answer).encode()) + TEMPLATE_TOKENS > context for answer in answers)


def _length(request: Any, tokenizer: Any) -> int:
    """Return the tokens of an answer that is scored; 0 for one that is generated."""
    if isinstance(request, AnswerRequest):
        return len(request.answer_ids)
    if request.request_type != "loglikelihood":
        return 0
    prompt, answer = request.args
    before = len(tokenizer(prompt.rstrip())["input_ids"]) if prompt else 0  # lm_eval gives the answer the white space
    return len(tokenizer(prompt + answer)["input_ids"]) - before
