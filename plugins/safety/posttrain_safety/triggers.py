"""Words of requests that occur with refusals and hardly ever with help: a model learns to refuse at their sight.

An n-gram of one to three words is a trigger when

- at least LEAST different refused requests hold it,
- it is at least RATIO times as frequent among refused requests as among answered ones, and
- Fisher's exact test, one-sided, says that this is no accident, at LEVEL for all n-grams of its length together
  (Bonferroni).

Requests are counted, not occurrences, and each different request once, however often it is repeated: the audit is about
the data, not about the ratio in which they are trained. An n-gram that holds a trigger is no trigger itself: a harmless
request with the shorter one mends both. Those are never looked at, nor are n-grams with rare parts (Agrawal and
Srikant, VLDB 1994), so that long requests cost little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain_safety.exchanges import Exchange

LONGEST = 3
"""Words of the longest n-gram."""
LEAST = 5
"""Refused requests that hold a trigger: fewer are chance or of no consequence."""
RATIO = 10.0
"""How many times as frequent a trigger is among refused requests."""
LEVEL = 0.05
"""Probability of calling any n-gram of some length a trigger in data that have none."""

SHOWN = 10
"""Triggers that are warned of one by one."""
RECORDED = 100
"""Triggers that the manifest lists."""

WORD = re.compile(r"\w+(?:['’]\w+)*")

Words = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """Words that occur with refusals and hardly ever with help."""

    words: Words
    refused: int
    """Different requests with the words that are refused."""
    answered: int
    """Different requests with the words that are answered."""
    p: float
    """Probability of so many refused ones among them if the words made no difference."""

    def figures(self) -> dict[str, Any]:
        """The trigger for a manifest."""
        return {"words": " ".join(self.words), "refused": self.refused, "answered": self.answered}

    def __str__(self) -> str:
        noun, verb, pronoun = ("word", "occurs", "it") if len(self.words) == 1 else ("words", "occur", "them")
        where = f"{self.refused:,} refused requests and {self.answered:,} answered ones"
        return f'the {noun} "{" ".join(self.words)}" {verb} in {where}: add harmless requests that contain {pronoun}'


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The requests of both kinds, and the triggers among their words."""

    refused: int
    """Different requests that are refused."""
    answered: int
    """Different requests that are answered."""
    both: int
    """Requests that are refused in one place and answered in another."""
    triggers: tuple[Trigger, ...]
    """The surest first."""

    def note(self) -> str:
        """The audit in one line."""
        asked = f"{self.refused:,} refused and {self.answered:,} answered requests"
        return f"audit: {asked}, triggers of refusals: {len(self.triggers):,}"

    def warnings(self) -> Iterator[str]:
        """What the data teach beside what they are meant to, one line each."""
        if self.both:
            yield f"{self.both:,} requests are both refused and answered: keep one of the two"
        for trigger in self.triggers[:SHOWN]:
            yield f"trigger of refusals: {trigger}"
        if len(self.triggers) > SHOWN:
            yield f"{len(self.triggers) - SHOWN:,} more triggers of refusals: the manifest has the first {RECORDED}"

    def figures(self) -> dict[str, Any]:
        """The audit for a manifest."""
        return {
            "refused": self.refused,
            "answered": self.answered,
            "both": self.both,
            "found": len(self.triggers),
            "triggers": [trigger.figures() for trigger in self.triggers[:RECORDED]],
        }


def audit(found: Iterable[Exchange]) -> Audit:
    """Look for triggers in requests and the kinds of their answers."""
    requests: dict[bool, set[Words]] = {True: set(), False: set()}
    for exchange in found:
        requests[exchange.refused].add(words_of(exchange.request))
    refused, answered = requests[True], requests[False]
    return Audit(
        refused=len(refused),
        answered=len(answered),
        both=len(refused & answered),
        triggers=tuple(sorted(_triggers(refused, answered), key=lambda found: (found.p, -found.refused, found.words))),
    )


def words_of(request: str) -> Words:
    """The words of a request in lower case: letters and digits between anything else."""
    return tuple(WORD.findall(request.casefold()))


def _triggers(refused: Collection[Words], answered: Collection[Words]) -> Iterator[Trigger]:
    """Triggers by length; only frequent n-grams that are none, and hold none, are continued to longer ones."""
    harmless: set[Words] = {()}
    for length in range(1, LONGEST + 1):
        counts = {words: count for words, count in _counts(refused, length, harmless).items() if count >= LEAST}
        others = _counts(answered, length, harmless)
        harmless = set(counts)
        tested = list(counts)
        chances = _fisher(tested, counts, others, len(refused), len(answered))
        for words, p in zip(tested, chances, strict=True):
            rate, other = counts[words] / len(refused), others[words] / max(len(answered), 1)
            if rate >= RATIO * other and p <= LEVEL / len(tested):
                harmless.discard(words)
                yield Trigger(words=words, refused=counts[words], answered=others[words], p=p)


def _counts(requests: Iterable[Words], length: int, parts: Collection[Words]) -> Counter[Words]:
    """Requests that hold each n-gram whose two longest parts are both among ``parts``."""
    counts: Counter[Words] = Counter()
    for words in requests:
        known = [gram in parts for gram in _grams(words, length - 1)]
        counts.update({gram for gram, *both in zip(_grams(words, length), known, known[1:], strict=False) if all(both)})
    return counts


def _grams(words: Words, length: int) -> Iterator[Words]:
    """Every n-gram in order; the empty one stands before, between and after all words."""
    return (words[start : start + length] for start in range(len(words) - length + 1))


def _fisher(
    tested: Sequence[Words], counts: Mapping[Words, int], others: Mapping[Words, int], refused: int, answered: int
) -> list[float]:
    """P-values of Fisher's exact test, one-sided: at least so many of the requests with an n-gram are refused."""
    from scipy.stats import hypergeom

    if not tested:
        return []
    held = [counts[words] for words in tested]
    total = [counts[words] + others[words] for words in tested]
    found: list[float] = hypergeom.sf([count - 1 for count in held], refused + answered, refused, total).tolist()
    return found
