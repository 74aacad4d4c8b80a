"""Records as token ids, and those among them that are trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from posttrain import BadInput, Problem, StageContext

Answer = tuple[str, list[int]]
"""What an answer is called in messages, and its token ids; the last is the end-of-turn token."""


class TokenRow(Protocol):
    """A prompt and its answers as token ids."""

    @property
    def prompt(self) -> list[int]:
        """Up to where an answer begins."""

    @property
    def answers(self) -> tuple[Answer, ...]:
        """What is said after the prompt: two answers of a pair, or one that was judged."""

    @property
    def where(self) -> str:
        """File and line of the record, for messages."""


Row = TypeVar("Row", bound=TokenRow)


@dataclass(frozen=True, kw_only=True)
class TokenRows(Generic[Row]):
    """The rows that are trained on, and how many are not."""

    noun: str
    """What a row is: ``pairs`` or ``answers``."""
    rows: list[Row]
    dropped: int
    """Rows in which prompt plus answer exceed the sequence length."""

    def figures(self) -> dict[str, int]:
        """What the manifest tells about them."""
        return {self.noun: len(self.rows), "dropped": self.dropped}


def fitting(context: StageContext, rendered: Iterable[Row], noun: str) -> TokenRows[Row]:
    """The rows within the sequence length: the others are left out and counted, for a cut answer teaches not to end.

    Raises BadInput when no row is left.
    """
    longest = context.config.sequence_length
    found = list(rendered)
    rows = [row for row in found if _length(row) <= longest]
    if not rows:
        raise BadInput(_nothing_left(context, len(found), noun))
    dropped = len(found) - len(rows)
    if dropped:
        context.progress.note(f"dropped {dropped} {noun} longer than {longest} tokens")
    return TokenRows(noun=noun, rows=rows, dropped=dropped)


def _length(row: TokenRow) -> int:
    return len(row.prompt) + max(len(ids) for _, ids in row.answers)


def _nothing_left(context: StageContext, count: int, noun: str) -> Problem:
    if not count:
        return Problem(where=f"{context.name}.data", what=f"holds no {noun} to learn from")
    return Problem(
        where=f"{context.name}.sequence_length",
        what=f"each of the {count} {noun} is longer than {context.config.sequence_length} tokens",
        fix=f"Raise it, or give shorter {noun}",
    )
