"""Metrics of the tasks on your own files: right answers, and bits per byte of held-out responses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.rewards.matching import is_right


def right(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score 1 when the text is a right answer by the document's ``match``, else 0."""
    (text,) = results
    return {"right": float(is_right(text, json.loads(doc["answer"]), doc["match"]))}


def bits_per_byte(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return the response's cross entropy in bits per byte of UTF-8, comparable between tokenizers."""
    ((likelihood, _),) = results
    return {"bits_per_byte": -likelihood / math.log(2) / len(doc["response"].encode())}
