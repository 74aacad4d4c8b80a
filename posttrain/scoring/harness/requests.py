"""The requests of a task's documents to a model: built once, the same for every system.

Paired tests need equal questions. lm_eval would build its few-shot prompts anew for each system, from a sampler whose
state moves on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from posttrain.digests import digest_of
from posttrain.errors import BadInput, Problem
from posttrain.scoring.fingerprint import task_settings
from posttrain.scoring.harness.tasks import load_leaves, shared_filters
from posttrain.scoring.isolation import quiet
from posttrain.scoring.questions import PreparedTask, Question

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask


def prepare_task(name: str, task: GateTask, tokenizer: Any, seed: int) -> PreparedTask:
    """Load a task and build the requests of its documents, or of a seeded sample of ``task.limit`` of them.

    Raises BadInput when a task cannot be loaded or compared, or when a target is not text.
    """
    leaves = load_leaves(name, task)
    with quiet():
        documents = [list(leaf.eval_docs) for leaf in leaves]
        questions = _questions(task, tokenizer, seed, leaves, documents)
    return PreparedTask(
        name=name,
        metric=task.metric,
        higher_is_better=bool(leaves[0].higher_is_better()[task.metric] or task.higher_is_better),
        leaves=leaves,
        filters=shared_filters(leaves),
        questions=questions,
        settings=[task_settings(leaf.config) for leaf in leaves],
    )


def _questions(
    task: GateTask, tokenizer: Any, seed: int, leaves: Sequence[Any], documents: Sequence[Sequence[Any]]
) -> list[Question]:
    chosen = _sample(sum(map(len, documents)), task.limit, seed)
    questions: list[Question] = []
    start = 0
    for leaf, docs in zip(leaves, documents, strict=True):
        chat = task.chat if task.chat is not None else leaf.OUTPUT_TYPE == "generate_until"
        renderer = _renderer(tokenizer) if chat else None
        # Seeded once per task: the sampler's state moves on with every prompt, and each prompt is built once.
        leaf.set_fewshot_seed(seed)
        questions += [
            _question(leaf, start + index, doc, renderer) for index, doc in enumerate(docs) if start + index in chosen
        ]
        start += len(docs)
    return questions


def _sample(total: int, limit: int | None, seed: int) -> set[int]:
    everything = range(total)
    return set(everything if limit is None or limit >= total else random.Random(seed).sample(everything, limit))


def _renderer(tokenizer: Any) -> Callable[..., str]:
    """Return lm_eval's own function for chat templates, bound to a tokenizer instead of a loaded model."""
    stand_in = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    return functools.partial(HFLM.apply_chat_template, stand_in)


def _question(leaf: Any, doc_id: int, doc: Any, renderer: Callable[..., str] | None) -> Question:
    chat = renderer is not None
    context = _context(leaf, doc, renderer)
    requests = leaf.construct_requests(
        doc=doc,
        ctx=context,
        metadata=(leaf.config["task"], doc_id, leaf.config.repeats),
        apply_chat_template=chat,
        chat_template=renderer,
    )
    requests = requests if isinstance(requests, list) else [requests]
    _check_texts(leaf, doc_id, requests)
    target = leaf.doc_to_target(doc)
    return Question(
        doc_id=doc_id,
        doc=doc,
        leaf=leaf,
        requests=requests,
        document_hash=_hash(json.dumps(doc, sort_keys=True, default=str)),
        request_hash=digest_of([[request.request_type, *request.args] for request in requests]),
        target_hash=_hash(str(target)),
        target=str(leaf.doc_to_choice(doc)[target] if _is_choice(leaf, doc, target) else target),
    )


def _context(leaf: Any, doc: Any, renderer: Callable[..., str] | None) -> Any:
    """Return the prompt of a document. A list of messages is rendered as it is, without few-shot examples."""
    messages = leaf.doc_to_text(doc)
    if isinstance(messages, list):
        plain = "\n\n".join(message["content"] for message in messages) + "\n\n"
        return plain if renderer is None else renderer(messages)
    return leaf.fewshot_context(
        doc,
        num_fewshot=leaf.config.num_fewshot or 0,
        system_instruction=None,
        apply_chat_template=renderer is not None,
        fewshot_as_multiturn=renderer is not None,
        chat_template=renderer,
        gen_prefix=leaf.doc_to_prefix(doc),
    )


def _check_texts(leaf: Any, doc_id: int, requests: Sequence[Any]) -> None:
    # lm_eval evaluates a rendered target that looks like a list, and would fail in the middle of scoring.
    for request in requests:
        if request.request_type == "loglikelihood" and not all(isinstance(text, str) for text in request.args):
            what = f"the target of document {doc_id} is not text: {request.args[1]!r:.60}"
            fix = "Name a column in doc_to_target instead of rendering it"
            raise BadInput(Problem(where=str(leaf.task_name), what=what, fix=fix))


def _is_choice(leaf: Any, doc: Any, target: Any) -> bool:
    return isinstance(target, int) and leaf.config.doc_to_choice is not None and target < len(leaf.doc_to_choice(doc))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
