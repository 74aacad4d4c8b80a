"""The rewards that come with posttrain. An answer that never ended is no right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from posttrain.rewards.code import code
from posttrain.rewards.judge import judge
from posttrain.rewards.matching import MATCHES, PATTERN_SECONDS, Undecided, is_right, is_usable, parse_json, search
from posttrain.rewards.maths import maths
from posttrain.rewards.reward import Reward, Score, lacks_nothing

if TYPE_CHECKING:
    from posttrain.data.records import Question

SUMMARIES = {
    "exact": "1 for nothing but the answer, blanks around it aside",
    "contains": "1 for a text with the answer in it, in upper or lower case",
    "regex": "1 for a text in which the answer, a pattern, is found",
    "numeric": "1 for a text whose last number is the answer",
    "json": "1 for a text that is JSON of the answer's value; of any value for questions without an answer",
}
MOST = "max_characters"
"""Key of a question's meta with the longest answer, in characters."""
FORM = "format"
"""Key of a question's meta with the pattern of a whole answer."""
TOO_LONG = f"the pattern takes more than {PATTERN_SECONDS:g} s of computing"
"""Note of an answer of which a pattern could not tell whether it is right: it has no score."""


def _told(compare: Callable[..., bool], *given: object, **options: bool) -> float | Score:
    try:
        return float(compare(*given, **options))
    except Undecided:
        return Score(value=None, note=TOO_LONG)


def _matching(name: str) -> Reward:
    def score(question: Question, text: str, ended: bool) -> float | Score:
        return _told(is_right, text, question.answers, name) if ended else 0.0

    def lacks(question: Question) -> str | None:
        if not question.answers:
            return "has no answer"
        wrong = next((answer for answer in question.answers if not is_usable(answer, name)), None)
        return None if wrong is None else f"has the answer {wrong!r}, not one to look for by {name}"

    return Reward(name=name, summary=SUMMARIES[name], version=1, score=score, lacks=lacks)


def _right(question: Question, text: str, ended: bool) -> float | Score:
    return _told(is_right, text, question.answers, question.match) if ended else 0.0


def _json(question: Question, text: str, ended: bool) -> float:
    if question.answers:
        return float(ended and is_right(text, question.answers, "json"))
    try:
        parse_json(text)
    except (ValueError, RecursionError):
        return 0.0
    return float(ended)


def _length(question: Question, text: str, ended: bool) -> float:
    most = question.meta[MOST]
    return 0.0 if not ended else max(0.0, min(1.0, 2 - len(text) / most))


def _lacks_length(question: Question) -> str | None:
    most = question.meta.get(MOST)
    known = isinstance(most, int | float) and not isinstance(most, bool) and most > 0
    return None if known else f"has no meta.{MOST} above 0"


def _format(question: Question, text: str, ended: bool) -> float | Score:
    return _told(search, question.meta[FORM], text.strip(), whole=True) if ended else 0.0


def _lacks_format(question: Question) -> str | None:
    known = isinstance(question.meta.get(FORM), str) and is_usable(question.meta[FORM], "regex")
    return None if known else f"has no pattern in meta.{FORM}"


def rewards() -> Sequence[Reward]:
    """Return every shipped reward."""
    return [
        Reward(
            name="right", summary="1 for a right answer by the question's own match", version=1, score=_right,
            lacks=lambda question: None if question.answers else "has no answer",
        ),
        *(_matching(name) for name in MATCHES if name != "json"),
        Reward(name="json", summary=SUMMARIES["json"], version=1, score=_json, lacks=lacks_nothing),
        Reward(
            name="length", summary=f"1 up to meta.{MOST} characters, falling to 0 at twice as many", version=1,
            score=_length, lacks=_lacks_length,
        ),
        Reward(
            name="ended", summary="1 for an answer that ended by itself", version=1,
            score=lambda question, text, ended: float(ended),
        ),
        Reward(
            name="format", summary=f"1 for a whole answer of the pattern meta.{FORM}", version=1, score=_format,
            lacks=_lacks_format,
        ),
        maths(),
        code(),
        judge(),
    ]  # fmt: skip
