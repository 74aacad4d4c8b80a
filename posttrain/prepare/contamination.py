"""Contaminated rows: records that hold what a gate asks, so that its score would show memory, not skill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class GateDocument:
    """A document that a gate scores."""

    task: str
    document: int
    """Number of the document in its task."""
    prompt: str
    """The question, without examples of other documents."""
    target: str
    """The answer that the task holds to be right; empty when it has none."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """A document of a gate that a row holds."""

    task: str
    document: int
    covered: float
    """Share of the document's words, those of the task's template left out, that the row holds."""
    evidence: str
    """The longest run of words in common."""
    side: Literal["prompt", "answer"] = "prompt"
    """The part of the row that holds the same part of the document."""
    kind: Literal["covered", "whole", "phrase"] = "covered"
    """``covered``: more than half of the words; ``whole``: all of a short document; ``phrase``: 13 words, no more."""


def find_contamination(
    rows: Iterable[Sequence[tuple[str, str]]], documents: Sequence[GateDocument], *, phrases: bool = False
) -> Iterator[tuple[int, Contamination]]:
    """Yield the number of each contaminated row with the document that it holds most of.

    Args:
        rows: Prompt and answer of each row, in chunks of any size.
        documents: Documents of all tasks of the gates.
        phrases: Yield phrases of 13 words in common, too, which contaminate no row by themselves.
    """
    raise NotImplementedError
