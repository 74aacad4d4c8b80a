"""Comparisons of a text with a right answer: gates and rewards use these and no others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from posttrain.host.time_limit import time_limit

PATTERN_SECONDS = 1.0
"""Computing time of a pattern on one text: some take for ever on a text that they nearly match."""
NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)


class Undecided(Exception):
    """A pattern takes too long to tell whether a text is right."""


NEEDED: Mapping[str, str] = {
    "exact": "a text that is not empty",
    "contains": "a text that is not empty",
    "regex": "a pattern of Python's re, as a text",
    "numeric": 'a number, or a text of nothing else, such as "1,200": no unit, percent sign or fraction',
    "json": "any value",
}
"""The right answers that each comparison can look for, in words."""


def is_right(text: str, answers: Sequence[Any], match: str) -> bool:
    """Return True when the text is any of the right answers by ``match``.

    Raises Undecided when a pattern takes too long to tell.
    """
    matches = MATCHES[match]
    return any(matches(text, answer) for answer in answers)


def is_usable(answer: Any, match: str) -> bool:
    """Return True when ``match`` can look for the answer."""
    if match == "json" or (match == "numeric" and isinstance(answer, int | float) and not isinstance(answer, bool)):
        return True
    if not isinstance(answer, str) or not answer:
        return False
    try:
        if match == "regex":
            re.compile(answer)
        elif match == "numeric":
            return math.isfinite(_number(answer))
    except (ValueError, re.error):
        return False
    return True


def search(pattern: str, text: str, *, whole: bool = False) -> bool:
    """Return True where the text has the pattern, or is a ``whole`` of it, dots matching line breaks.

    Raises Undecided when it takes more than PATTERN_SECONDS to tell.
    """
    try:
        with time_limit(PATTERN_SECONDS):
            found = re.fullmatch(pattern, text, re.DOTALL) if whole else re.search(pattern, text)
    except TimeoutError:
        what = f"the pattern {pattern!r:.80} takes more than {PATTERN_SECONDS:g} s of computing on one text"
        raise Undecided(f"{what}: avoid repetitions within repetitions, as in (a+)+") from None
    return found is not None


def parse_json(text: str) -> Any:
    """Return the JSON value that is the whole text or its first block of code; raises ValueError when it is none."""
    block = FENCE.search(text)
    return json.loads(block[1] if block else text, parse_constant=_no_json)


def _no_json(name: str) -> NoReturn:
    """Reject NaN and Infinity, which Python reads and JSON has not (RFC 8259)."""
    raise ValueError(f"{name} is no value of JSON")


def _exact(text: str, answer: str) -> bool:
    """Match the whole text, apart from blanks around it."""
    return text.strip() == answer.strip()


def _contains(text: str, answer: str) -> bool:
    """Match the answer anywhere in the text, in upper or lower case."""
    return answer.casefold() in text.casefold()


def _regex(text: str, answer: str) -> bool:
    """Match the pattern anywhere in the text."""
    return search(answer, text)


def _numeric(text: str, answer: Any) -> bool:
    """Match the text's last number, to nine digits; commas may separate thousands."""
    numbers = NUMBER.findall(text)
    return bool(numbers) and math.isclose(_number(numbers[-1]), _number(str(answer)), rel_tol=1e-9, abs_tol=1e-12)


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def _json(text: str, answer: Any) -> bool:
    """Match JSON of an equal value, as the whole text or its first block of code; the order of keys does not count."""
    try:
        found = parse_json(text)
    except (ValueError, RecursionError):
        return False
    return bool(_typed(found) == _typed(answer))


def _typed(value: Any) -> Any:
    """Return a value with every leaf tagged, because Python takes True and 1 for equal and JSON does not."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return (isinstance(value, bool), value)


MATCHES: Mapping[str, Callable[[str, Any], bool]] = {
    "exact": _exact,
    "contains": _contains,
    "regex": _regex,
    "numeric": _numeric,
    "json": _json,
}
"""Functions that compare a text with an answer, by a question's ``match``."""
