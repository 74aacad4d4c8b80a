"""Rules for raw texts from the web: lines, words and symbols that prose has no such share of.

Thresholds are those of C4 (arXiv:1910.10683), Gopher (arXiv:2112.11446) and FineWeb (arXiv:2406.17557). They hold for
prose alone: chats, code, tables and verse break them rightly, so that no chat is judged, and no text left out unasked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

FEWEST_WORDS = 50
WORD_LENGTHS = (3, 10)
"""Least and most mean characters of a word."""
FEWEST_LETTERS = 0.8
"""Least share of words with a letter."""
MOST_SYMBOLS = 0.1
"""Most number signs and ellipses for a word."""
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
FEWEST_STOP_WORDS = 2
MOST_BULLETS = 0.9
MOST_ELLIPSES = 0.3
FEWEST_ENDS = 0.12
"""Least share of lines that end in a mark."""
FEWEST_LINES = 3
"""Lines of the shortest text whose lines are compared."""
SHORT_LINE = 30
MOST_SHORT_LINES = 0.67
MOST_REPEATED_LINES = 0.3

LETTER = re.compile(r"[^\W\d_]")
SYMBOL = re.compile(r"#|\.\.\.|…")
BULLET = re.compile(r"[-*•‣◦▪●○]\s")
ELLIPSIS = ("...", "…")
END = re.compile(r"[.!?。！？…][\"'”’»)\]]*$")
NOTICE = re.compile(
    r"\b(?:enable|turn on|requires?|disabled?|without) java ?script\b"
    r"|\bjava ?script (?:is|must be) (?:disabled|enabled)\b"
    r"|\b(?:this (?:web)?site |we )uses? cookies\b|\baccept (?:all )?cookies\b|\buses cookies\b|\buse of cookies\b"
    r"|\b(?:terms of (?:use|service)|privacy policy|cookie policy)\s*(?:$|[|·•])",
    re.IGNORECASE | re.MULTILINE,
)
BRACE = re.compile(r"[{}]")


@dataclass(frozen=True)
class WebText:
    """A text by its words and lines."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        """Pieces between spaces."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines with content."""
        return [line for each in self.text.splitlines() if (line := each.strip())]

    def share(self, fits: Callable[[str], object]) -> float:
        """Return the share of the lines that fit; 0 for a text of few lines."""
        return sum(map(bool, map(fits, self.lines))) / len(self.lines) if len(self.lines) >= FEWEST_LINES else 0.0

    def first(self, fits: Callable[[str], object]) -> str:
        """Return the first line that fits."""
        return next(filter(fits, self.lines))


Fault = tuple[str, float]
"""Evidence and strength."""


def words(text: WebText) -> Fault | None:
    """Find a text of few words."""
    count = len(text.words)
    return (text.text, float(FEWEST_WORDS - count)) if 0 < count < FEWEST_WORDS else None


def word_length(text: WebText) -> Fault | None:
    """Find words that are shorter or longer than those of any prose."""
    if not text.words:
        return None
    mean = sum(map(len, text.words)) / len(text.words)
    longest = max(text.words, key=len)
    return None if WORD_LENGTHS[0] <= mean <= WORD_LENGTHS[1] else (longest, max(mean - WORD_LENGTHS[1], 3 - mean))


def letters(text: WebText) -> Fault | None:
    """Find a text of which many words have no letter."""
    bare = [word for word in text.words if LETTER.search(word) is None]
    share = len(bare) / (len(text.words) or 1)
    return (" ".join(bare), share) if share > 1 - FEWEST_LETTERS else None


def symbols(text: WebText) -> Fault | None:
    """Find number signs and ellipses between the words."""
    found = list(SYMBOL.finditer(text.text))
    share = len(found) / (len(text.words) or 1)
    return (text.text[found[0].start() :], share) if share > MOST_SYMBOLS else None


def stop_words(text: WebText) -> Fault | None:
    """Find a text without the words that any English text has."""
    if len(text.words) < FEWEST_WORDS:
        return None
    known = STOP_WORDS.intersection(map(str.lower, text.words))
    return (text.text, float(FEWEST_STOP_WORDS - len(known))) if len(known) < FEWEST_STOP_WORDS else None


def bullets(text: WebText) -> Fault | None:
    """Find a text that is one list."""
    share = text.share(BULLET.match)
    return (text.first(BULLET.match), share) if share > MOST_BULLETS else None


def ellipses(text: WebText) -> Fault | None:
    """Find lines that were cut to be followed by a link."""
    share = text.share(lambda line: line.endswith(ELLIPSIS))
    return (text.first(lambda line: line.endswith(ELLIPSIS)), share) if share > MOST_ELLIPSES else None


def ends(text: WebText) -> Fault | None:
    """Find lines that are no sentences: menus, tables, titles."""
    if len(text.lines) < FEWEST_LINES:
        return None
    share = text.share(END.search)
    return (text.first(lambda line: not END.search(line)), 1 - share) if share < FEWEST_ENDS else None


def short_lines(text: WebText) -> Fault | None:
    """Find a text of short lines."""
    share = text.share(lambda line: len(line) < SHORT_LINE)
    return (text.first(lambda line: len(line) < SHORT_LINE), share) if share > MOST_SHORT_LINES else None


def repeated_lines(text: WebText) -> Fault | None:
    """Find lines that stand in the text before."""
    if len(text.lines) < FEWEST_LINES:
        return None
    line, times = Counter(text.lines).most_common(1)[0]
    share = 1 - len(set(text.lines)) / len(text.lines)
    return (line, share) if times > 1 and share > MOST_REPEATED_LINES else None


def notice(text: WebText) -> Fault | None:
    """Find what a page says about itself: scripts to switch on, cookies, its terms."""
    return _matches(text, NOTICE)


def braces(text: WebText) -> Fault | None:
    """Find code between the sentences."""
    return _matches(text, BRACE)


def _matches(text: WebText, pattern: re.Pattern[str]) -> Fault | None:
    places: Iterator[re.Match[str]] = pattern.finditer(text.text)
    first = next(places, None)
    return None if first is None else (text.text[max(first.start() - 20, 0) :], 1.0 + sum(1 for _ in places))


WEB: dict[str, Callable[[WebText], Fault | None]] = {
    "web_words": words, "web_word_length": word_length, "web_letters": letters, "web_symbols": symbols,
    "web_stop_words": stop_words, "web_bullets": bullets, "web_ellipses": ellipses, "web_ends": ends,
    "web_short_lines": short_lines, "web_repeated_lines": repeated_lines, "web_notice": notice, "web_braces": braces,
}  # fmt: skip
"""The rules by the names in ``config.preparation.RULES``."""
