"""Preference records as token ids, rendered once by the renderer of SFT and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain import StageContext
from posttrain_preference.rows import Answer, TokenRows, keep_fitting


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A prompt and its two answers as token ids; an answer ends with the end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str
    """File and line of the record, for messages."""

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Return both answers, the chosen one first."""
        return ("chosen", self.chosen), ("rejected", self.rejected)

    @property
    def aside(self) -> list[int]:
        """Return no answer to another prompt: no loss of pairs needs one."""
        return []


def render_pairs(context: StageContext) -> TokenRows[TokenPair]:
    """Render every record; raises BadInput for one that cannot be rendered, and without any short enough pair."""
    return keep_fitting(context, _render(context), "pairs")


def pair_columns(rows: Sequence[TokenPair]) -> dict[str, list[list[int]]]:
    """Return the columns of TRL's collator for pairs."""
    return {
        "prompt_ids": [row.prompt for row in rows],
        "chosen_ids": [row.chosen for row in rows],
        "rejected_ids": [row.rejected for row in rows],
    }


def _render(context: StageContext) -> Iterator[TokenPair]:
    renderer = context.renderer()
    for record in context.records:
        rendered = renderer.preference(record)
        yield TokenPair(rendered.prompt, rendered.chosen, rendered.rejected, record.where)
