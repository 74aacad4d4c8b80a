"""Quality rules on single rows: named, versioned, linear in the length of the row.

Each looks at the answers that are trained; ``docs/data.md`` has what they find in real data. The actions are settings
(``config.preparation``): a fault in one data set is the point of another.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.data.declines import OPENING, REFUSAL
from posttrain.data.records import Conversation
from posttrain.prepare.arithmetic import wrong_annotations, wrong_equations
from posttrain.prepare.fences import PYTHON, fault_of, fences
from posttrain.prepare.filters import Finding
from posttrain.prepare.rows import Row
from posttrain.prepare.web import WEB, Fault, WebText

EVIDENCE = 200
"""Characters of evidence in the ledger."""
COPIED_WORDS = 4
"""Words of the shortest prompt whose copy is a fault: shorter ones are echoed on purpose."""
GRAM = 8
"""Words of the groups that are looked for twice."""
REPEATED_SHARE = 0.3
REPEATED_WORDS = 32
"""Words of the shortest answer in which repetition is looked for."""
PACKED_CHARACTERS = 1000
PACKED_SHARE = 0.03
"""Compressed size of a text, of its own size, below which it repeats itself without end."""
SHORT_WORDS = 3
CUT_WORDS = 40
"""Words of the shortest answer of which the end is looked at."""

MARKER = re.compile(
    r"<\|[A-Za-z][\w-]{0,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|^(?:#{1,4} ?)?(?:User|Human|Assistant|System) ?: ",
    re.MULTILINE,
)
PLACEHOLDER = re.compile(
    r"\[(?:your|insert|enter|company|recipient)\b[^\[\],\n]{0,40}\](?!\()|\[(?:name|date|address)\](?!\()"
    r"|\{\{ ?\w{1,40} ?\}\}"
    r"|<(?:insert|your)\b[^<>\n]{0,40}>|\blorem ipsum\b",
    re.IGNORECASE,
)
BOILERPLATE = re.compile(
    r"\bas an? (?:AI|artificial intelligence)\b(?: language)?(?: model| assistant)?|\bmy knowledge cut-?off\b"
    r"|\b(?:as of )?my last (?:knowledge )?update\b",
    re.IGNORECASE,
)
ENDS = re.compile(r"[.!?:;…。！？)\]}\"'”’»`*_~|>$#\d-]$|[^\w\s,]$")
"""Ends of a finished text; a letter or a comma is none."""
HASHTAG = re.compile(r"(?:^|\s)(?:#\S+|https?://\S+|[-*•] .*|\d+[.)] .*)$")
"""Last lines that end without a mark: tags, links, items of a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule; ``prepare.plugin`` registers it by its name."""

    name: str
    find: Callable[[Row], Finding | None]
    """Returns the row's fault, or None."""
    on_raw_text: bool = True
    """False for a rule about answers."""
    on_chats: bool = True
    """False for a rule about texts of the web."""

    def judge(self, rows: Sequence[Row]) -> list[Finding | None]:
        """Return the finding or None for each row."""
        return [self.find(row) if self._concerns(row) else None for row in rows]

    def _concerns(self, row: Row) -> bool:
        return row.has_answers and not row.is_disliked and (self.on_raw_text if row.is_raw else self.on_chats)


def excerpt(text: str, start: int = 0, end: int | None = None) -> str:
    """Return a part of a text with some of its surroundings, on one line, in EVIDENCE characters at most."""
    end = min(len(text), start + 1) if end is None else end
    spare = max(EVIDENCE - 2 - (end - start), 0) // 2
    first = max(start - spare, 0)
    part = text[first : first + EVIDENCE - 2]
    cut = ("…" if first else "") + " ".join(part.split()) + ("…" if first + len(part) < len(text) else "")
    return cut[:EVIDENCE]


def _empty(row: Row) -> Finding | None:
    if all(answer.strip() for answer in row.answers):
        return None
    return Finding(evidence="the text is empty" if row.is_raw else f"an answer is empty; prompt: {excerpt(row.prompt)}")


def _copied_prompt(row: Row) -> Finding | None:
    for prompt, answer in row.exchanges:
        words = answer.lower().split()
        if len(words) >= COPIED_WORDS and words == prompt.lower().split():
            return Finding(evidence=excerpt(answer))
    return None


def _repetition(row: Row) -> Finding | None:
    text = row.answer
    if len(text) >= PACKED_CHARACTERS:
        packed = len(zlib.compress(text.encode("utf-8", "replace"), 1)) / len(text.encode("utf-8", "replace"))
        if packed < PACKED_SHARE:
            return Finding(evidence=excerpt(text, len(text) // 2), score=1 - packed)
    words = text.lower().split()
    if len(words) < REPEATED_WORDS:
        return None
    grams = [tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]
    share = 1 - len(set(grams)) / len(grams)
    if share <= REPEATED_SHARE:
        return None
    seen: set[tuple[str, ...]] = set()
    twice = next(gram for gram in grams if gram in seen or seen.add(gram))  # type: ignore[func-returns-value]
    return Finding(evidence=excerpt(" ".join(twice)), score=share)


def _short(row: Row) -> Finding | None:
    words = len(row.answer.split())
    return Finding(evidence=excerpt(row.answer), score=SHORT_WORDS - words) if 0 < words < SHORT_WORDS else None


def _cut_off(row: Row) -> Finding | None:
    for answer in row.answers:
        text = answer.rstrip()
        if len(text.split()) <= CUT_WORDS or ENDS.search(text[-1:]):
            continue
        last = text[-EVIDENCE:].splitlines()[-1]
        if not HASHTAG.search(last) and any(mark in text for mark in ".!?"):
            return Finding(evidence=excerpt(text, max(len(text) - 1, 0)), marked=text.split()[-1][-EVIDENCE // 2 :])
    return None


def _refusal(row: Row) -> Finding | None:
    record = row.record
    if isinstance(record, Conversation) and any("refuses" in message for message in record.messages):
        return None  # its author has said so
    for answer in row.answers:
        if found := REFUSAL.search(answer[:OPENING]):
            return Finding(evidence=excerpt(answer, *found.span()), marked=found[0].strip())
    return None


def _matching(pattern: re.Pattern[str]) -> Callable[[Row], Finding | None]:
    """Return the rule that finds a pattern in an answer; its score is the number of places."""

    def find(row: Row) -> Finding | None:
        text = row.answer
        first, count = None, 0
        for found in pattern.finditer(text):
            first, count = first or found, count + 1
        if first is None:
            return None
        return Finding(evidence=excerpt(text, *first.span()), score=count, marked=first[0].strip())

    return find


def _annotation(row: Row) -> Finding | None:
    wrong = list(wrong_annotations(row.answer)) if "<<" in row.answer else []
    return Finding(evidence=excerpt(wrong[0]), score=len(wrong)) if wrong else None


def _equation(row: Row) -> Finding | None:
    wrong = list(wrong_equations(row.answer)) if "=" in row.answer else []
    return Finding(evidence=excerpt(wrong[0]), score=len(wrong)) if wrong else None


def _open_fence(row: Row) -> Finding | None:
    opened = [fence for answer in row.answers for fence in fences(answer) if fence.is_open]
    return Finding(evidence=excerpt(f"```{opened[0].language} {opened[0].content}")) if opened else None


def _broken(languages: Sequence[str]) -> Callable[[Row], Finding | None]:
    """Return the rule that finds fences in these languages that do not parse."""

    def find(row: Row) -> Finding | None:
        faults = [fault for answer in row.answers for fence in fences(answer) if (fault := fault_of(fence, languages))]
        return Finding(evidence=excerpt(faults[0]), score=len(faults)) if faults else None

    return find


def _of_the_web(rule: Callable[[WebText], Fault | None]) -> Callable[[Row], Finding | None]:
    """Return a rule about a raw text."""

    def find(row: Row) -> Finding | None:
        fault = rule(WebText(row.answer))
        return None if fault is None else Finding(evidence=excerpt(fault[0]), score=fault[1])

    return find


_RULES = (
    Rule(name="empty", find=_empty),
    Rule(name="copied_prompt", find=_copied_prompt, on_raw_text=False),
    Rule(name="repetition", find=_repetition),
    Rule(name="short", find=_short, on_raw_text=False),
    Rule(name="cut_off", find=_cut_off, on_raw_text=False),
    Rule(name="marker", find=_matching(MARKER)),
    Rule(name="placeholder", find=_matching(PLACEHOLDER)),
    Rule(name="refusal", find=_refusal, on_raw_text=False),
    Rule(name="boilerplate", find=_matching(BOILERPLATE), on_raw_text=False),
    Rule(name="annotation", find=_annotation),
    Rule(name="equation", find=_equation),
    Rule(name="open_fence", find=_open_fence, on_raw_text=False),
    Rule(name="code", find=_broken(PYTHON), on_raw_text=False),
    Rule(name="json", find=_broken(("json",)), on_raw_text=False),
    *(Rule(name=name, find=_of_the_web(find), on_chats=False) for name, find in WEB.items()),
)
QUALITY: Mapping[str, Rule] = {rule.name: rule for rule in _RULES}
"""The rules by the names in ``config.preparation.RULES``."""
