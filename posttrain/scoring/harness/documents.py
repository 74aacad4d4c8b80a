"""Documents of a gate's tasks as texts: what is asked and what is right, without examples and without a template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Half, Role
from posttrain.errors import Problem
from posttrain.gate.halves import select_half
from posttrain.prepare.contamination import GateDocument
from posttrain.scoring.checks import blaming
from posttrain.scoring.harness.requests import hash_document, sample_documents, wording
from posttrain.scoring.harness.tasks import preflight
from posttrain.scoring.isolation import quiet

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig, GateTask


def gate_documents(tasks: Mapping[str, GateTask]) -> Iterator[GateDocument]:
    """Yield every document of the tasks, those beyond a task's ``limit`` too.

    Raises BadInput when a task cannot be loaded, or its functions fail on a document.
    """
    for name, leaves in preflight(tasks).items():
        where, number = f"tasks.{name}", 0
        for leaf in leaves:
            found = []
            with quiet():  # once for all: it clears what every logger remembers
                with blaming(where, None):
                    documents = list(leaf.eval_docs)
                for doc in documents:
                    with blaming(f"{where}, document {number}"):
                        found.append(GateDocument(name, number, _asked(leaf, doc), _right(leaf, doc)))
                    number += 1
            yield from found


def empty_halves(gate: GateConfig, tasks: Mapping[str, GateTask]) -> Iterator[Problem]:
    """Yield a problem for each guard without a document in the half that chooses a share, or in the one that judges."""
    guards = {name: task for name, task in tasks.items() if task.role is Role.guard}
    for name, leaves in preflight(guards).items():
        task = guards[name]
        with quiet(), blaming(f"tasks.{name}", None):
            documents = [doc for leaf in leaves for doc in leaf.eval_docs]
        asked = sample_documents(len(documents), task.limit, gate.seed)
        hashes = {number: hash_document(documents[number]) for number in asked}
        sources = {} if task.cluster is None else {number: str(documents[number][task.cluster]) for number in asked}
        for half, does in ((Half.choosing, "chooses the share"), (Half.judging, "judges the chosen one")):
            if not select_half(hashes, half, sources):
                what = f"none of its {len(asked)} documents is of the half that {does}, so no share can be found by it"
                yield Problem(where=f"tasks.{name}", what=what, fix="Give it more documents, or give replay.share")


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
