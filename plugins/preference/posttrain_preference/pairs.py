"""Preference records as token ids: rendered once, by the renderer that SFT and evaluation use too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain import StageContext
from posttrain_preference.rows import Answer, TokenRows, fitting


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
        """Both, the chosen one first."""
        return ("chosen", self.chosen), ("rejected", self.rejected)


def render_pairs(context: StageContext) -> TokenRows[TokenPair]:
    """Render every record of the stage; raises BadInput when one cannot be rendered, or when no pair is left."""
    return fitting(context, _rendered(context), "pairs")


def pair_columns(rows: Sequence[TokenPair]) -> dict[str, list[list[int]]]:
    """The columns that TRL's collator of pairs reads."""
    return {
        "prompt_ids": [row.prompt for row in rows],
        "chosen_ids": [row.chosen for row in rows],
        "rejected_ids": [row.rejected for row in rows],
    }


def _rendered(context: StageContext) -> Iterator[TokenPair]:
    renderer = context.renderer()
    for record in context.records:
        rendered = renderer.preference(record)
        yield TokenPair(rendered.prompt, rendered.chosen, rendered.rejected, record.where)
