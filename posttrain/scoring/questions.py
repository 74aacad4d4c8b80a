"""Questions of a gate: documents and their requests to a model, the same for every system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from posttrain.gate.halves import select_half
from posttrain.gate.sequential import Look, select_new

if TYPE_CHECKING:
    from posttrain.config.schema import Half

Asked = Mapping[int, tuple[str, str, str]]
"""By document: the hashes of document, requests and target."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One document, with its requests to a model."""

    doc_id: int
    doc: Any
    leaf: Any
    """Its lm-eval task."""
    requests: list[Any]
    document_hash: str
    request_hash: str
    target_hash: str
    target: str
    words: str = ""
    """Hash of the question without the examples before it: what it asks, and the choices or the text to be judged."""

    wording: str = ""
    """Text of the question as the task words it, without examples and template; empty where it words none."""

    place: str = ""
    """File and line of an own document, such as ``questions.jsonl:17``; empty for the documents of other tasks."""

    @property
    def contents(self) -> tuple[str, str, str]:
        """Hashes each of which makes two questions with an equal one the same."""
        return self.document_hash, self.request_hash, self.words

    @property
    def repeats(self) -> list[int]:
        """Number of answers to each request."""
        return [request.repeats or 1 for request in self.requests]

    @property
    def prompt(self) -> str:
        """Text before the answer; of several requests, the first one's."""
        return str(self.requests[0].args[0])

    @property
    def shown(self) -> str:
        """Text of the question for people: as the task words it, else the prompt."""
        return self.wording or self.prompt

    @property
    def length(self) -> int:
        """Characters of the longest request. Questions of like length are asked together, with little padding."""
        return max(sum(len(text) for text in request.args if isinstance(text, str)) for request in self.requests)


@dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """A task of a gate with its questions."""

    name: str
    metric: str
    higher_is_better: bool
    leaves: Sequence[Any]
    filters: Sequence[str]
    questions: Sequence[Question]
    ends: Sequence[int]
    """Tokens that end a generated answer beside the model's own: those of the chat template, in a chat."""
    settings: Any
    """Fingerprint of the tasks' settings as JSON values: no paths, with hashes of their functions' source."""

    def in_half(self, half: Half, clusters: Mapping[int, str] | None) -> PreparedTask:
        """Return the task with only the questions of a half."""
        hashes = {question.doc_id: question.document_hash for question in self.questions}
        chosen = select_half(hashes, half, clusters)
        return replace(self, questions=[question for question in self.questions if question.doc_id in chosen])

    def at(self, look: Look, seed: int, clusters: Mapping[int, str] | None) -> PreparedTask:
        """Return the task with only the new questions of one look."""
        chosen = select_new([question.doc_id for question in self.questions], look, seed, clusters)
        return replace(self, questions=[question for question in self.questions if question.doc_id in chosen])

    @property
    def ordered(self) -> Sequence[Question]:
        """The questions in the order of asking, longest first: a batch too big for memory fails at the start."""
        return sorted(self.questions, key=lambda question: -question.length)

    @property
    def asked(self) -> Asked:
        """Hashes of every question."""
        return {item.doc_id: (item.document_hash, item.request_hash, item.target_hash) for item in self.questions}
