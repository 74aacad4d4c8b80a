"""Records as token ids, and the choice of those short enough to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from posttrain import BadInput, Problem, StageContext

Answer = tuple[str, list[int]]
"""Name of an answer in messages, and its token ids; the last is the end-of-turn token."""


class TokenRow(Protocol):
    """A prompt and its answers as token ids."""

    @property
    def prompt(self) -> list[int]:
        """Token ids up to the answer."""

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Answers to the prompt: two of a pair, or one judged answer."""

    @property
    def where(self) -> str:
        """File and line of the record, for messages."""


Row = TypeVar("Row", bound=TokenRow)


@dataclass(frozen=True, kw_only=True)
class TokenRows(Generic[Row]):
    """The rows to train, and the number of dropped ones."""

    noun: str
    """Name of the rows: ``pairs`` or ``answers``."""
    rows: list[Row]
    dropped: int
    """Rows whose prompt plus answer exceed the sequence length."""

    def figures(self) -> dict[str, int]:
        """Return the manifest's figures of the rows."""
        return {self.noun: len(self.rows), "dropped": self.dropped}


def keep_fitting(context: StageContext, rendered: Iterable[Row], noun: str) -> TokenRows[Row]:
    """Keep the rows within the sequence length; drop and count the others, for a cut answer teaches not to end.

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
