"""Rewards as plugins register them: what they are asked, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from posttrain.data.records import Question

MOST = 1e30
"""Greatest score, either way: sums, spreads and squares of rewards stay finite."""
NOTE_BYTES = 96
"""Bytes of the longest note; a longer one is cut, wherever it was left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score of an answer with a note, for rewards that can fail to read, to run or to judge an answer."""

    value: float | None
    """One number of at most 1e30 either way; None for an answer that could not be scored, which is counted and trains
    nothing."""
    note: str = ""
    """What happened, in few words that are the same for all alike: they are counted, their first 96 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A sampled answer to a question, as rewards see it."""

    question: Question
    """The question with its right answers."""
    text: str
    """The answer's text."""
    ended: bool
    """True when the answer ended by itself, False when it was cut at ``max_tokens``."""


Scores: TypeAlias = Callable[[Sequence[Attempt]], Sequence[float | Score]]
"""Scores several answers at once, one for each in their order."""


def lacks_nothing(question: Question) -> str | None:
    """Return None: the reward reads nothing of a question that could be missing."""
    return None


def needs_nothing(settings: Any) -> str:
    """Return no name: the scores depend on nothing but the reward's own code."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward of answers, as a plugin registers it: with ``score`` for one answer, or with ``open`` for many."""

    name: str
    """Name in recipes."""
    summary: str
    """One line for ``posttrain list rewards``."""
    version: int
    """Version of its scores, part of every result's name: raise it with each change of a score."""
    score: Callable[[Question, str, bool], float | Score] | None = None
    """Returns one finite number, or a Score, for an answer: the question, the answer's text, True when the answer ended
    by itself and False when it was cut at ``max_tokens``."""
    lacks: Callable[[Question], str | None] = lacks_nothing
    """Returns what a question lacks for this reward, as in ``has no answer``; None for a usable question."""
    settings: type[Any] | None = None
    """Dataclass of its settings in recipes, ``reward: {NAME: {weight: 1, SETTING: ...}}``; None without any."""
    prepare: Callable[[Any], str] = needs_nothing
    """Returns, of its settings and before anything trains, what else its scores depend on, such as a digest; raises
    BadInput where the reward cannot be had: a missing package, consent, place."""
    open: Callable[[Any, Path], Scores] | None = None
    """Returns, of its settings and the folder of what runs share, the function that scores several answers at once."""
