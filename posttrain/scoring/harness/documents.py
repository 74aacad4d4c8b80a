"""Documents of a gate's tasks as texts: what is asked and what is right, without examples and without a template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.prepare.contamination import GateDocument
from posttrain.scoring.checks import blaming
from posttrain.scoring.harness.requests import wording
from posttrain.scoring.harness.tasks import preflight
from posttrain.scoring.isolation import quiet

if TYPE_CHECKING:
    from posttrain.config.schema import GateTask


def gate_documents(tasks: Mapping[str, GateTask]) -> Iterator[GateDocument]:
    """Yield every document of the tasks, those beyond a task's ``limit`` too.

    Raises BadInput when a task cannot be loaded, or its functions fail on a document.
    """
    for name, leaves in preflight(tasks).items():
        where, number = f"tasks.{name}", 0
        for leaf in leaves:
            with quiet(), blaming(where, None):
                documents = list(leaf.eval_docs)
            for doc in documents:
                with quiet(), blaming(f"{where}, document {number}"):
                    yield GateDocument(name, number, _asked(leaf, doc), _right(leaf, doc))
                number += 1


def _asked(leaf: Any, doc: Any) -> str:
    """Return the question: by the task's field for it where it names one, else as the task words it."""
    if leaf.should_decontaminate() and (query := leaf.doc_to_decontamination_query(doc)):
        return str(query)
    asked = leaf.doc_to_text(doc)
    if isinstance(asked, list):  # a whole conversation
        return wording(asked)
    if isinstance(asked, int):  # the contexts are the choices, as in Winogrande
        return str(leaf.doc_to_choice(doc)[asked])
    return str(asked or leaf.doc_to_target(doc)) if leaf.OUTPUT_TYPE == "loglikelihood_rolling" else str(asked)


def _right(leaf: Any, doc: Any) -> str:
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        return str(leaf.doc_to_target(doc))
    target = leaf.doc_to_target(doc)
    if isinstance(target, int) and leaf.config.doc_to_choice is not None:
        choices = leaf.doc_to_choice(doc)
        return str(choices[target]) if 0 <= target < len(choices) else ""
    return "\n".join(map(str, target)) if isinstance(target, list) else str(target)
