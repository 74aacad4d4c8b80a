"""Trigger words: those of requests that are declined, and hardly ever of requests that are answered.

A model learns to decline at their sight. An n-gram of one to three words is a trigger when

- at least LEAST different declined requests hold it,
- it is at least RATIO times as frequent among declined requests as among answered ones, and
- Fisher's exact test, one-sided, rejects chance at LEVEL for all n-grams of its length together (Bonferroni).

Each different request counts once, and each n-gram once in it: the audit is of the data, not of the ratio in which they
are trained. An n-gram that holds a trigger is no trigger itself, because a harmless request with the shorter one mends
both. Neither those nor n-grams with rare parts are counted (Agrawal and Srikant, VLDB 1994), so that long requests cost
little.
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
"""Declined requests that hold a trigger: fewer are chance or of no consequence."""
RATIO = 10.0
"""Least ratio of a trigger's frequency among declined requests to that among answered ones."""
LEVEL = 0.05
"""Probability of finding any trigger of some length in data without triggers."""

SHOWN = 10
"""Triggers with a warning of their own."""
RECORDED = 100
"""Triggers in the manifest."""

WORD = re.compile(r"\w+(?:['’]\w+)*")

Words = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """Words of declined requests that hardly occur in answered ones."""

    words: Words
    declined: int
    """Different declined requests with the words."""
    answered: int
    """Different answered requests with the words."""
    p: float
    """Probability of so many declined ones among them if the words made no difference."""

    def figures(self) -> dict[str, Any]:
        """Return the trigger's entry in the manifest."""
        return {"words": " ".join(self.words), "refused": self.declined, "answered": self.answered}

    def __str__(self) -> str:
        noun, verb, pronoun = ("word", "occurs", "it") if len(self.words) == 1 else ("words", "occur", "them")
        where = f"{self.declined:,} declined requests and {self.answered:,} answered ones"
        return f'the {noun} "{" ".join(self.words)}" {verb} in {where}: add harmless requests that contain {pronoun}'


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The requests of both kinds, and the triggers among their words."""

    declined: int
    """Different declined requests."""
    answered: int
    """Different answered requests."""
    both: int
    """Requests that are declined in one place and answered in another."""
    triggers: tuple[Trigger, ...]
    """Triggers, the surest first."""

    def note(self) -> str:
        """Return the audit in one line."""
        asked = f"{self.declined:,} declined and {self.answered:,} answered requests"
        return f"audit: {asked}, trigger words: {len(self.triggers):,}"

    def warnings(self) -> Iterator[str]:
        """Yield a line for each unwanted lesson of the data."""
        if self.both:
            yield f"{self.both:,} requests are both declined and answered: keep one of the two"
        for trigger in self.triggers[:SHOWN]:
            yield f"trigger: {trigger}"
        if len(self.triggers) > SHOWN:
            yield f"{len(self.triggers) - SHOWN:,} more triggers: the manifest has the first {RECORDED}"

    def figures(self) -> dict[str, Any]:
        """Return the audit's part of the manifest."""
        return {
            "refused": self.declined,
            "answered": self.answered,
            "both": self.both,
            "found": len(self.triggers),
            "triggers": [trigger.figures() for trigger in self.triggers[:RECORDED]],
        }


def audit(found: Iterable[Exchange]) -> Audit:
    """Find the triggers of requests, given the kinds of their answers."""
    requests: dict[bool, set[Words]] = {True: set(), False: set()}
    for exchange in found:
        requests[exchange.declined].add(words_of(exchange.request))
    declined, answered = requests[True], requests[False]
    return Audit(
        declined=len(declined),
        answered=len(answered),
        both=len(declined & answered),
        triggers=tuple(
            sorted(_triggers(declined, answered), key=lambda found: (found.p, -found.declined, found.words))
        ),
    )


def words_of(request: str) -> Words:
    """Return the words of a request in lower case: letters and digits between anything else."""
    return tuple(WORD.findall(request.casefold()))


def _triggers(declined: Collection[Words], answered: Collection[Words]) -> Iterator[Trigger]:
    """Yield triggers by length; only a frequent n-gram that neither is nor holds one can grow."""
    harmless: set[Words] = {()}
    for length in range(1, LONGEST + 1):
        counts = {words: count for words, count in _counts(declined, length, harmless).items() if count >= LEAST}
        others = _counts(answered, length, harmless)
        harmless = set(counts)
        tested = list(counts)
        chances = _fisher(tested, counts, others, len(declined), len(answered))
        for words, p in zip(tested, chances, strict=True):
            rate, other = counts[words] / len(declined), others[words] / max(len(answered), 1)
            if rate >= RATIO * other and p <= LEVEL / len(tested):
                harmless.discard(words)
                yield Trigger(words=words, declined=counts[words], answered=others[words], p=p)


def _counts(requests: Iterable[Words], length: int, parts: Collection[Words]) -> Counter[Words]:
    """Count the requests with each n-gram whose two longest parts are both among ``parts``."""
    counts: Counter[Words] = Counter()
    for words in requests:
        known = [gram in parts for gram in _grams(words, length - 1)]
        counts.update({gram for gram, *both in zip(_grams(words, length), known, known[1:], strict=False) if all(both)})
    return counts


def _grams(words: Words, length: int) -> Iterator[Words]:
    """Return every n-gram in order; the empty one is before, between and after all words."""
    return (words[start : start + length] for start in range(len(words) - length + 1))


def _fisher(
    tested: Sequence[Words], counts: Mapping[Words, int], others: Mapping[Words, int], declined: int, answered: int
) -> list[float]:
    """Return one-sided p-values of Fisher's exact test for so many declined requests with an n-gram."""
    from scipy.stats import hypergeom

    if not tested:
        return []
    held = [counts[words] for words in tested]
    total = [counts[words] + others[words] for words in tested]
    found: list[float] = hypergeom.sf([count - 1 for count in held], declined + answered, declined, total).tolist()
    return found
