"""What a gate asks: the documents of a task with the requests that put them to a model, the same for every system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.gate.sequential import Look, select_new

Asked = Mapping[int, tuple[str, str, str]]
"""By document: the hashes of document, requests and target."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One document, with the requests that put it to a model."""

    doc_id: int
    doc: Any
    leaf: Any
    """The lm-eval task that it belongs to."""
    requests: list[Any]
    document_hash: str
    request_hash: str
    target_hash: str
    target: str

    @property
    def repeats(self) -> list[int]:
        """How many answers each request asks for."""
        return [request.repeats or 1 for request in self.requests]

    @property
    def prompt(self) -> str:
        """What the model reads before it answers; of several requests, the first one's."""
        return str(self.requests[0].args[0])

    @property
    def length(self) -> int:
        """Characters of the longest request: what is alike in length is asked together, with little padding."""
        return max(sum(len(text) for text in request.args if isinstance(text, str)) for request in self.requests)


@dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """A task of a gate with the questions that every system is asked."""

    name: str
    metric: str
    higher_is_better: bool
    leaves: Sequence[Any]
    filters: Sequence[str]
    questions: Sequence[Question]
    settings: Any
    """What the tasks' files say, as JSON values without paths, with the source of their functions."""

    def at(self, look: Look, seed: int, clusters: Mapping[int, str] | None) -> PreparedTask:
        """The task with the questions that are asked at one look for the first time."""
        chosen = select_new([question.doc_id for question in self.questions], look, seed, clusters)
        return replace(self, questions=[question for question in self.questions if question.doc_id in chosen])

    @property
    def ordered(self) -> Sequence[Question]:
        """The questions as they are asked: those of much the same length together, the longest first."""
        return sorted(self.questions, key=lambda question: -question.length)

    @property
    def asked(self) -> Asked:
        """The hashes of every question."""
        return {item.doc_id: (item.document_hash, item.request_hash, item.target_hash) for item in self.questions}
