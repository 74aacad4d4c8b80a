"""Judged answers as rows of a token table: two of a preference, the chosen answer first, and one of feedback.

ids     p0 p1 p2 a0 a1      prompt and answer, up to the answer's stop token
mask     .  .  .  T  T      the answer
flag    True for a chosen or a good answer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.records import Conversation, Feedback, Preference
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.table import TableRow, TokenTable


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """A prompt and one answer as token ids, views of the store's: neither is held in memory."""

    prompt: Sequence[int]
    """Token ids of the prompt."""
    answer: Sequence[int]
    """Token ids of the answer; the last is its stop token."""
    label: bool
    """True for a good answer, and for the chosen one of a preference."""
    where: str
    """File and line of the record, for messages."""


class Judging:
    """The way from a preference or feedback to its rows."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer with its chat template."""
        self._renderer = ChatRenderer(tokenizer)

    def rows(self, records: Iterable[Preference | Feedback]) -> Iterator[TableRow]:
        """Yield the rows of each record.

        Raises BadInput for one that cannot be rendered, or for a preference whose answers come out equal.
        """
        for record in records:
            yield from self._rows(record)

    def _rows(self, record: Preference | Feedback) -> list[TableRow]:
        if isinstance(record, Preference):
            pair = self._renderer.preference(record)
            return [
                _row(pair.prompt, pair.chosen, record.where, label=True, after=1),
                _row(pair.prompt, pair.rejected, record.where, label=False),
            ]
        chat = Conversation(messages=(*record.prompt, *record.completion), where=record.where, tools=record.tools)
        rendered = self._renderer.conversation(chat, last_only=True)
        start = rendered.mask.index(True)
        end = start + sum(rendered.mask)
        return [_row(rendered.ids[:start], rendered.ids[start:end], record.where, label=record.label)]


def answers_of(table: TokenTable) -> Iterator[JudgedAnswer]:
    """Yield the answers of a table, in its order."""
    documents, labels = table.all(), table.rows["flag"].tolist()
    for place, label in enumerate(labels):
        ids, mask = documents.tokens(place)
        start = int(mask.argmax())
        yield JudgedAnswer(ids[:start].data, ids[start:].data, label, documents.where(place))


def _row(prompt: list[int], answer: list[int], where: str, *, label: bool, after: int = 0) -> TableRow:
    mask = [False] * len(prompt) + [True] * len(answer)
    return TableRow(Rendered([*prompt, *answer], mask, "", where), flag=label, chat=False, after=after)
