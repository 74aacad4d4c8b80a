"""Preference records as token ids: rendered once, by the renderer that evaluation uses too."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain import BadInput, Problem, StageContext


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A prompt and its two answers as token ids; an answer ends with the end-of-turn token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str
    """File and line of the record, for messages."""


@dataclass(kw_only=True)
class TokenPairs:
    """The pairs that are trained on, and how many are not."""

    rows: list[TokenPair] = field(default_factory=list)
    dropped: int = 0
    """Pairs in which prompt plus answer exceed the sequence length."""

    def columns(self) -> dict[str, list[list[int]]]:
        """The columns that TRL's collator reads."""
        return {
            "prompt_ids": [row.prompt for row in self.rows],
            "chosen_ids": [row.chosen for row in self.rows],
            "rejected_ids": [row.rejected for row in self.rows],
        }


def render_pairs(context: StageContext) -> TokenPairs:
    """Render every record of the stage and drop the pairs that are too long: a cut answer would teach not to end.

    Raises BadInput when a record cannot be rendered, or when no pair is left.
    """
    renderer = context.renderer()
    longest = context.config.sequence_length
    pairs = TokenPairs()
    for record in context.records:
        rendered = renderer.preference(record)
        row = TokenPair(rendered.prompt, rendered.chosen, rendered.rejected, record.where)
        if len(row.prompt) + max(len(row.chosen), len(row.rejected)) > longest:
            pairs.dropped += 1
        else:
            pairs.rows.append(row)
    if not pairs.rows:
        raise BadInput(_nothing_left(context))
    if pairs.dropped:
        context.progress.note(f"dropped {pairs.dropped} pairs longer than {longest} tokens")
    return pairs


def _nothing_left(context: StageContext) -> Problem:
    if not context.records:
        return Problem(where=f"{context.name}.data", what="holds no preference pairs")
    return Problem(
        where=f"{context.name}.sequence_length",
        what=f"each of the {len(context.records)} pairs is longer than {context.config.sequence_length} tokens",
        fix="Raise it, or give shorter pairs",
    )
