"""Rehearsals of a task's scoring: invented answers through its own filters and functions, before a model is asked.

Whatever a task lacks shows up here in seconds: else it would after the training and the last answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.errors import ArtifactDamaged, BadInput, Problem
from posttrain.scoring.harness.requests import prepare_first
from posttrain.scoring.harness.scoring import apply_filters, measure
from posttrain.scoring.harness.tasks import load_leaves
from posttrain.scoring.isolation import muted, quiet, seeded
from posttrain.scoring.questions import PreparedTask, Question

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask

SENTENCES = (
    "The answer is 42. Is it, though? Yes! First: 3.5 apples, then -1,000 — naïve, 日本語, \N{GRINNING FACE}.\n\n"
    '* **One** point\n* "Another"\n\n```json\n{"a": [1, true]}\n```\n#### 42\n'
)
INVENTED = {
    "an answer of several sentences": SENTENCES,
    "an empty answer": "",
    "a short answer": "Yes.",
    "a long answer": SENTENCES * 50,
}
FIRST = 8
"""Documents of a task that get every invented answer; in a group, at least one of each task."""
MORE = 1000
"""Documents of a task that get the first one: often only some of them need a function."""
SECONDS = 10
"""Time for the documents after the first ones, and computing time for all of them once a problem is found."""
PROBLEMS = 5
"""Different problems of a task that are listed."""


def rehearse(tasks: Mapping[str, GateTask], leaves: Mapping[str, Sequence[Any]]) -> None:
    """Score invented answers to the first documents of loaded tasks. Raises BadInput with what would stop a gate."""
    problems: list[Problem] = []
    for name, task in tasks.items():
        try:
            with quiet(), muted(), seeded(0):
                prepared = prepare_first(name, task, leaves[name], FIRST, MORE)
            rehearse_task(prepared)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)


def check_chats(tasks: Mapping[str, GateTask], load_tokenizer: Callable[[], Any]) -> list[Problem]:
    """Return the first document of each task with ``chat: true`` that the chat template of a base cannot render."""
    asked = [name for name, task in tasks.items() if task.chat]
    tokenizer, problems = load_tokenizer() if asked else None, []
    for name in asked:
        try:
            with quiet(), muted(), seeded(0):
                prepare_first(name, tasks[name], load_leaves(name, tasks[name]), FIRST, MORE, tokenizer)
        except BadInput as error:
            problems += error.problems
    return problems


def rehearse_task(task: PreparedTask) -> None:
    """Score invented answers to the first questions of a task. Raises BadInput with what would stop a gate."""
    found: dict[str, Problem] = {}
    end = time.process_time() + SECONDS
    with quiet(), muted(), seeded(0):
        for question, kind in _trials(task):
            try:
                _try(task, question, INVENTED[kind])
            except (BadInput, ArtifactDamaged) as error:
                what, fix = str(error), ""
                if isinstance(error, BadInput):
                    what, fix = error.problems[0].what, error.problems[0].fix
                where = f"tasks.{task.name}, document {question.doc_id}, {kind}"
                found.setdefault(what, Problem(where=where, what=what, fix=fix))
            if len(found) == PROBLEMS or (found and time.process_time() > end):  # what is slow once is slow again
                break
    for question in task.questions:
        _forget(question)
    if found:
        raise BadInput(list(found.values()))


def _trials(task: PreparedTask) -> Iterator[tuple[Question, str]]:
    """Yield questions, each with the kind of an invented answer."""
    first = max(1, FIRST // len(task.leaves))
    asked = {id(leaf): [question for question in task.questions if question.leaf is leaf] for leaf in task.leaves}
    for questions in asked.values():
        yield from ((question, kind) for question in questions[:first] for kind in INVENTED)
    end = time.monotonic() + SECONDS
    for leaf in task.leaves:
        # Likelihoods differ less than texts do, and a task that runs programs starts a process for each.
        if leaf.OUTPUT_TYPE == "generate_until" and not getattr(leaf, "UNSAFE_CODE", False):
            for question in asked[id(leaf)][first : MORE // len(task.leaves)]:
                if time.monotonic() > end:
                    return
                yield question, next(iter(INVENTED))


def _try(task: PreparedTask, question: Question, text: str) -> None:
    """Score an invented answer by every filter. Raises BadInput or ArtifactDamaged as scoring does."""
    _forget(question)
    for request in question.requests:
        request.resps = [_invent(request, text)] * (request.repeats or 1)
    where = f"document {question.doc_id}"
    apply_filters(question.leaf, [question], where)
    for name in task.filters:
        measure(task, question, name, where)


def _invent(request: Any, text: str) -> Any:
    likelihood = -1.0 - request.idx - len(text) % 7
    return {"generate_until": text, "loglikelihood": (likelihood, not text)}.get(request.request_type, likelihood)


def _forget(question: Question) -> None:
    for request in question.requests:
        request.resps, request.filtered_resps = [], {}
