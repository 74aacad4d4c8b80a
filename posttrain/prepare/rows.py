"""Rows: the texts of a record on which rules, duplicates and contamination are judged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeVar

from posttrain.config.preparation import Compared
from posttrain.data.declines import is_declined, opens_with_decline
from posttrain.data.records import Conversation, Feedback, Message, Preference, Question, Record, Text
from posttrain.digests import canonical

CHUNK = 2000
"""Rows that are judged together."""
DIGEST_BYTES = 16
"""Bytes of a record's digest."""
BETWEEN = "\n\n"
"""Separator of the turns in a row's text."""

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One record as its texts; of a preference pair, the prompt and the chosen answer are judged."""

    record: Record
    """The record itself."""

    @property
    def where(self) -> str:
        """Place of the record, such as ``file:line``."""
        return self.record.where

    @cached_property
    def exchanges(self) -> Sequence[tuple[str, str]]:
        """Pairs of a prompt and the judged answer to it, turn by turn; raw text is an answer to an empty prompt."""
        record = self.record
        if isinstance(record, Text):
            return [("", record.text)]
        if isinstance(record, Conversation):
            return _exchanges(record.messages)
        if isinstance(record, Question):
            return [(_exchanges(record.prompt)[0][0], BETWEEN.join(map(str, record.answers)))]
        answer = record.chosen if isinstance(record, Preference) else record.completion
        return _exchanges((*record.prompt, *answer), since=len(record.prompt))

    @cached_property
    def prompt(self) -> str:
        """Text of all prompts, system turns apart."""
        return BETWEEN.join(prompt for prompt, _ in self.exchanges if prompt)

    @property
    def answers(self) -> Sequence[str]:
        """Judged answers, in the order of their turns."""
        return [answer for _, answer in self.exchanges]

    @cached_property
    def answer(self) -> str:
        """Text of all judged answers."""
        return BETWEEN.join(self.answers)

    @cached_property
    def is_raw(self) -> bool:
        """True for raw text."""
        return isinstance(self.record, Text)

    @property
    def has_answers(self) -> bool:
        """True when the row holds answers that are trained, and not questions that a model will answer."""
        return not isinstance(self.record, Question)

    @property
    def is_disliked(self) -> bool:
        """True for an answer that was judged bad: it may have any fault."""
        return isinstance(self.record, Feedback) and not self.record.label

    @property
    def is_declined(self) -> bool:
        """True when an answer declines: by its key ``refuses`` if it has one, else by its first words."""
        record = self.record
        if isinstance(record, Conversation):
            return is_declined(record)
        return self.has_answers and not self.is_raw and any(map(opens_with_decline, self.answers))

    def compared(self, over: Compared) -> str:
        """Return the text in which duplicates are looked for; a rejected answer is part of it."""
        rejected = BETWEEN.join(map(_text, self.record.rejected)) if isinstance(self.record, Preference) else ""
        parts = {Compared.prompt: [self.prompt], Compared.answer: [self.answer, rejected]}
        texts = parts.get(over, [BETWEEN.join(part for pair in self.exchanges for part in pair if part), rejected])
        return BETWEEN.join(text for text in texts if text)

    def setting(self) -> bytes:
        """Return a digest of what makes equal texts different rows: system turns, tools, the label."""
        record = self.record
        if isinstance(record, Text):
            return b""
        turns = record.messages if isinstance(record, Conversation) else record.prompt
        system = [turn.get("content") for turn in turns if turn.get("role") == "system"]
        label = record.label if isinstance(record, Feedback) else None
        tools = () if isinstance(record, Question) else record.tools
        return b"" if not system and not tools and label is None else _digest([system, tools, label])

    def digest(self) -> bytes:
        """Return a digest of the record's content, 16 bytes; its place and source have no part in it."""
        record = self.record
        names = ("text", "messages", "prompt", "chosen", "rejected", "completion", "label", "tools", "answers")
        return _digest([type(record).__name__, *(getattr(record, name, None) for name in names)])


def batches(items: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Yield the items in lists of ``size``, the last one shorter."""
    waiting = iter(items)
    while batch := list(islice(waiting, size)):
        yield batch


def _exchanges(messages: Sequence[Message], since: int = 0) -> list[tuple[str, str]]:
    """Return the answers from turn ``since`` on, each with the turns since the former one; context is no answer."""
    found: list[tuple[str, str]] = []
    waiting: list[str] = []
    for at, message in enumerate(messages):
        text = _text(message)
        if message.get("role") == "assistant" and at >= since and message.get("train", True):
            found.append((BETWEEN.join(waiting), text))
            waiting = []
        elif message.get("role") != "system" and text:
            waiting.append(text)
    return found or [(BETWEEN.join(waiting), "")]


def _text(message: Message) -> str:
    """Return everything a turn says: its thoughts, its content and its calls."""
    parts = [message.get("reasoning_content"), message.get("content")]
    if message.get("tool_calls"):
        parts.append(json.dumps(message["tool_calls"], sort_keys=True, ensure_ascii=False, default=str))
    return "\n".join(part for part in parts if isinstance(part, str) and part)


def _digest(value: Any) -> bytes:
    try:
        text = canonical(value)
    except (TypeError, ValueError):  # of a plugin's record; JSON has no such value
        text = repr(value)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
