"""What a loaded task says about its metric and its documents, and whether a gate may rely on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput, Problem, suggest

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask
    from posttrain.scoring.questions import PreparedTask


def check_direction(where: str, task: GateTask, declared: bool | None) -> Iterator[Problem]:
    """The problem of a metric that the gate takes the other way round than the task, or that nobody says a way of."""
    setting, stated = f"{where}.higher_is_better", task.higher_is_better
    if declared is None and stated is None:
        what = f"the task does not say whether more {task.metric} is better"
        yield Problem(where=setting, what=what, fix="Give higher_is_better: true, or false")
    elif stated not in (None, declared) and declared is not None:
        what = f"is {str(stated).lower()}, but for the task {'more' if declared else 'less'} {task.metric} is better"
        yield Problem(where=setting, what=what, fix="Leave it out, or correct the task")


def check_cluster(where: str, task: GateTask, documents: Iterable[Any]) -> Iterator[Problem]:
    """The problem of documents that have no field for their source."""
    if task.cluster is None:
        return
    for index, document in enumerate(documents):
        if not isinstance(document, Mapping) or document.get(task.cluster) is None:
            fields = [str(key) for key in document] if isinstance(document, Mapping) else []
            what = f"document {index} has no field {task.cluster}"
            yield Problem(where=f"{where}.cluster", what=what, fix=suggest(task.cluster, fields))
            return


def clusters(gate: Mapping[str, GateTask], prepared: Iterable[PreparedTask]) -> dict[str, dict[int, str]]:
    """The source of every document, for the tasks of a gate that ask for it; raises BadInput when one has none."""
    found: dict[str, dict[int, str]] = {}
    for task in prepared:
        field = gate[task.name].cluster
        if field is not None:
            documents = [question.doc for question in task.questions]
            if problems := list(check_cluster(f"tasks.{task.name}", gate[task.name], documents)):
                raise BadInput(problems)
            found[task.name] = {question.doc_id: str(question.doc[field]) for question in task.questions}
    return found
