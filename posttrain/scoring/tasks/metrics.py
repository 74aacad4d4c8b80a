"""Metrics of the tasks on your own files: right answers, and bits per byte of held-out responses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def right(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score 1 when the text is a right answer by the document's ``match``, else 0."""
    (text,) = results
    matches = MATCHES[doc["match"]]
    return {"right": float(any(matches(text, answer) for answer in json.loads(doc["answer"])))}


def bits_per_byte(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the response's cross entropy in bits per byte of UTF-8, comparable between tokenizers."""
    ((likelihood, _),) = results
    return {"bits_per_byte": -likelihood / math.log(2) / len(doc["response"].encode())}


def _exact(text: str, answer: str) -> bool:
    """Match the whole text, apart from blanks around it."""
    return text.strip() == answer.strip()


def _contains(text: str, answer: str) -> bool:
    """Match the answer anywhere in the text, in upper or lower case."""
    return answer.casefold() in text.casefold()


def _regex(text: str, answer: str) -> bool:
    """Match the pattern anywhere in the text."""
    return re.search(answer, text) is not None


def _numeric(text: str, answer: Any) -> bool:
    """Match the text's last number, to nine digits; commas may separate thousands."""
    numbers = NUMBER.findall(text)
    return bool(numbers) and math.isclose(_number(numbers[-1]), _number(str(answer)), rel_tol=1e-9, abs_tol=1e-12)


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def _json(text: str, answer: Any) -> bool:
    """Match JSON of an equal value, as the whole text or its first block of code; the order of keys does not count."""
    block = FENCE.search(text)
    try:
        found = json.loads(block[1] if block else text)
    except ValueError:
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
