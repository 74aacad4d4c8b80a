"""Answers and scores: every question put to a system, block by block, and its answer scored."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from lm_eval.api.metrics import mean

from posttrain.errors import ArtifactDamaged, BadInput, Problem
from posttrain.gate.spec import DocumentScore
from posttrain.scoring.cache import Blocks
from posttrain.scoring.checks import blaming
from posttrain.scoring.harness.responder import Responder
from posttrain.scoring.isolation import seeded
from posttrain.scoring.questions import PreparedTask, Question


def answer(
    task: PreparedTask,
    responder: Responder,
    blocks: Blocks,
    system: str,
    digest: str,
    seed: int,
    report: Callable[..., None],
) -> list[DocumentScore]:
    """Put every question to a system and score it.

    A block is a batch of documents in the order of ``task.ordered``. Each is kept in ``blocks`` as soon as it is
    answered, and kept blocks are not asked again. ``report(done, total)`` is called after each block, and every few
    seconds within one, with its tokens so far. Raises ArtifactDamaged when a log-likelihood, a logit or a score is not
    finite, BadInput when the task's own functions fail or give no number.
    """
    kept, total = blocks.read(), len(task.questions)
    for index, requests in enumerate(requests_by_block(task, blocks.size)):
        if not _restore(requests, kept.get(index)):
            tell = partial(report, index * blocks.size, total)
            ask_block(requests, index, task.ends, responder, seed, f"{system}, {task.name}", tell)
            blocks.add(index, [request.resps for request in requests])
        report(min((index + 1) * blocks.size, total), total)
    return score_answers(task, system, digest)


def ask_block(
    requests: Sequence[Any],
    index: int,
    ends: Sequence[int],
    responder: Responder,
    seed: int,
    where: str,
    report: Callable[[int], None],
) -> None:
    """Answer the requests of one block in place, the same whatever was asked before; see ``Responder.respond``."""
    with seeded(seed + index):
        responder.respond(requests, ends, where, report)


def missing_blocks(task: PreparedTask, blocks: Blocks) -> list[int]:
    """Return the numbers of the blocks without kept answers."""
    kept = blocks.read()
    asked = enumerate(requests_by_block(task, blocks.size))
    return [index for index, requests in asked if not _restore(requests, kept.get(index))]


def recall(task: PreparedTask, blocks: Blocks, system: str, digest: str) -> list[DocumentScore] | None:
    """Score a system's kept answers; return None when some are missing."""
    kept = blocks.read()
    asked = enumerate(requests_by_block(task, blocks.size))
    complete = all(_restore(requests, kept.get(index)) for index, requests in asked)
    return score_answers(task, system, digest) if complete else None


def requests_by_block(task: PreparedTask, size: int) -> list[list[Any]]:
    """Return the requests of each block."""
    ordered = task.ordered
    return [
        [request for question in ordered[start : start + size] for request in question.requests]
        for start in range(0, len(ordered), size)
    ]


def score_answers(task: PreparedTask, system: str, digest: str) -> list[DocumentScore]:
    """Return one row per filter and document, from the answers in the requests."""
    for leaf in task.leaves:
        apply_filters(leaf, [item for item in task.questions if item.leaf is leaf], f"{system}, {task.name}")
    return [_score(task, question, name, system, digest) for name in task.filters for question in task.questions]


def apply_filters(leaf: Any, questions: Sequence[Question], where: str) -> None:
    """Filter the answers in the requests of questions.

    Raises BadInput with the first document that a filter fails, or at which its time is up.
    """
    requests = [request for question in questions for request in question.requests]
    if not requests:
        return
    try:
        with blaming(where, len(questions)):
            for ensemble in leaf._filters:
                ensemble.apply(requests)
    except BadInput:
        if len(questions) > 1:  # a filter sees all documents at once: find the one
            with blaming(where, len(questions)):
                for question in questions:
                    apply_filters(leaf, [question], f"{where}, document {question.doc_id}")
        raise


def _restore(requests: Sequence[Any], answers: Sequence[Any] | None) -> bool:
    """Give requests the answers of a kept block; return False when it does not hold as many as they ask for."""
    if answers is None or [len(given) for given in answers] != [request.repeats or 1 for request in requests]:
        return False
    for request, given in zip(requests, answers, strict=True):
        # JSON made a list of lm_eval's pair (log-likelihood, is this the likeliest text).
        request.resps, request.filtered_resps = [tuple(one) if isinstance(one, list) else one for one in given], {}
    return True


def _score(task: PreparedTask, question: Question, name: str, system: str, digest: str) -> DocumentScore:
    where = f"{system}, {task.name}, document {question.doc_id}"
    return DocumentScore(
        system=system,
        digest=digest,
        task=task.name,
        filter=name,
        doc_id=question.doc_id,
        document_hash=question.document_hash,
        request_hash=question.request_hash,
        target_hash=question.target_hash,
        metrics=measure(task, question, name, where),
        response=_response(question),
        target=question.target,
    )


def measure(task: PreparedTask, question: Question, name: str, where: str) -> dict[str, float]:
    """Return the metrics of a filtered answer that are means over documents.

    Raises BadInput when the task's own functions fail or give no number, ArtifactDamaged when one is not finite.
    """
    with blaming(where):
        given = [request.filtered_resps[name] for request in question.requests]
        results = question.leaf.process_results(copy.deepcopy(question.doc), given)
        aggregation = question.leaf.aggregation()
        metrics = {
            metric: float(value)
            for metric, value in results.items()
            if aggregation.get(metric) is mean and isinstance(value, (numbers.Real, np.bool_))
        }
    if task.metric not in metrics:
        raise BadInput(Problem(where=where, what=f"the task gives no number for {task.metric}"))
    if unsound := [metric for metric, value in metrics.items() if not math.isfinite(value)]:
        raise ArtifactDamaged(f"{where}: {', '.join(unsound)} is not a finite number")
    return metrics


def _response(question: Question) -> str:
    """Return the generated text, the preferred choice, or the log-likelihood."""
    first = question.requests[0].resps[0]
    if isinstance(first, str):
        return first
    if question.leaf.OUTPUT_TYPE == "multiple_choice":
        choices = question.leaf.doc_to_choice(question.doc)
        likelihoods = [request.resps[0][0] for request in question.requests[: len(choices)]]
        return str(choices[int(np.argmax(likelihoods))])
    return f"log-likelihood {first[0] if isinstance(first, tuple) else first:.4f}"
