"""Judged answers as token ids, in an order with good and bad ones in every batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from posttrain import BadInput, Feedback, Preference, Problem, StageContext
from posttrain_preference.rows import TokenRows, split_fitting

if TYPE_CHECKING:
    from posttrain_preference.config import KTOSettings

BALANCE = (1.0, 4 / 3)
"""Good answers times their weight over bad ones times theirs: the recommended range (arXiv:2402.01306, Eq. 8)."""


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """A prompt and one judged answer as token ids; the answer ends with the end-of-turn token."""

    prompt: Sequence[int]
    completion: Sequence[int]
    label: bool
    """True when the answer was judged good."""
    where: str
    """File and line of the record, for messages."""
    aside: Sequence[int] = ()
    """The answer to another prompt of the batch, for the KL term; empty where the loss has none."""

    @property
    def judgement(self) -> tuple[object, ...]:
        """Return what is judged, and how."""
        return tuple(self.prompt), tuple(self.completion), self.label

    @property
    def opposite(self) -> tuple[object, ...]:
        """Return the other judgement of the same answer."""
        return tuple(self.prompt), tuple(self.completion), not self.label

    @property
    def answers(self) -> tuple[tuple[str, Sequence[int]], ...]:
        """Return the one answer."""
        return (("good" if self.label else "bad", self.completion),)


@dataclass(frozen=True, kw_only=True)
class Judged(TokenRows[TokenAnswer]):
    """The judged answers in training order: whole batches, the last one filled up from the beginning."""

    repeated: int
    """Answers at the end that repeat those of the beginning."""

    @property
    def own(self) -> list[TokenAnswer]:
        """Return the answers without those that fill the last batch."""
        return self.rows[: len(self.rows) - self.repeated]

    def figures(self) -> dict[str, int]:
        """Return the manifest's figures of the answers."""
        good = sum(row.label for row in self.own)
        return {"answers": len(self.own), "good": good, "repeated": self.repeated, "dropped": self.dropped}


def render_feedback(context: StageContext) -> Judged:
    """Render every judged answer, and each preference as a good and a bad one, and mix both kinds.

    Raises BadInput for a record that cannot be rendered, without any short enough one, and for a single label.
    """
    trained, measured = (_judged(context, records) for records in (context.records, context.eval_records))
    found = split_fitting(context, trained, measured, "answers")
    _require_both(context, found.rows)
    _advise(context, found.rows)
    ordered = interleave(found.rows, context.seed)
    size = context.config.per_device_batch_size
    repeated = -len(ordered) % size
    filled = [ordered[place % len(ordered)] for place in range(len(ordered) + repeated)]
    rows, eval_rows = filled, found.eval_rows
    if context.config.loss_type == "kto":
        rows, eval_rows = (with_mismatches(each, size) for each in (filled, found.eval_rows))
    return Judged(noun=found.noun, rows=rows, eval_rows=eval_rows, dropped=found.dropped, repeated=repeated)


def with_mismatches(rows: Sequence[TokenAnswer], size: int) -> list[TokenAnswer]:
    """Give each row the answer before its own in its batch of ``size`` rows, the first row the last one.

    KTO estimates the divergence of policy and reference from such pairs of a prompt and an answer to another.
    """
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [replace(row, aside=batch[place - 1].completion) for batch in batches for place, row in enumerate(batch)]


def interleave(rows: Sequence[TokenAnswer], seed: int) -> list[TokenAnswer]:
    """Spread both kinds evenly over the whole order, each shuffled by ``seed``.

    Any ``n`` neighbours hold both kinds if the rarer one's share is at least 1 in ``n``.
    """
    generator = random.Random(f"feedback/{seed}")
    placed: list[tuple[int, bool, TokenAnswer]] = []
    for label in (True, False):
        kind = [row for row in rows if row.label is label]
        generator.shuffle(kind)
        others = len(rows) - len(kind)  # (place + 1/2) / len(kind) of the way, times twice the product of both counts
        placed += [((2 * place + 1) * others, label, row) for place, row in enumerate(kind)]
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]


def _judged(context: StageContext, records: Sequence[Feedback | Preference]) -> Iterator[TokenAnswer]:
    for each in context.answers(records):
        yield TokenAnswer(each.prompt, each.answer, each.label, each.where)


def _require_both(context: StageContext, rows: Sequence[TokenAnswer]) -> None:
    labels = {row.label for row in rows}
    if len(labels) == 2:
        return
    word = "good" if labels.pop() else "bad"
    raise BadInput(
        Problem(
            where=f"{context.name}.data",
            what=f"all {len(rows)} answers were judged {word}, so there is nothing to compare",
            fix="Add answers with the other label, or use preferences",
        )
    )


def _advise(context: StageContext, rows: Sequence[TokenAnswer]) -> None:
    """Warn when one kind outweighs the other, or is too rare for every batch."""
    settings: KTOSettings = context.config
    good = sum(row.label for row in rows)
    bad = len(rows) - good
    least, most = BALANCE
    if not least <= good * settings.desirable_weight / (bad * settings.undesirable_weight) <= most:
        context.warn(
            f"good answers: {good}, bad ones: {bad}; set {context.name}.desirable_weight between "
            f"{_rounded(least * bad / good * settings.undesirable_weight)} and "
            f"{_rounded(most * bad / good * settings.undesirable_weight)}, or undesirable_weight between "
            f"{_rounded(good / bad * settings.desirable_weight / most)} and "
            f"{_rounded(good / bad * settings.desirable_weight / least)}"
        )
    if min(good, bad) * settings.per_device_batch_size < len(rows):
        context.warn(
            f"some batches hold only {'good' if good > bad else 'bad'} answers (good: {good}, bad: {bad}): "
            f"set {context.name}.per_device_batch_size to at least {-(-len(rows) // min(good, bad))}"
        )


def _rounded(weight: float) -> str:
    return f"{weight:.3g}"
