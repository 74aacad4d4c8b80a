"""Records rendered into tokens, each mask read back, and split into rows to train on and documents of the eval loss."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.data.records import Conversation, Document, Message, Text
from posttrain.engine.config import FineTuneConfig, TrainOn
from posttrain.engine.evaluation import Evaluation
from posttrain.errors import BadInput, Problem
from posttrain.sft.declines import is_declined
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.masks import mask_fault
from posttrain.tokens.overlong import fit
from posttrain.tokens.packing import PackedRow, Packing, pack
from posttrain.tokens.shares import Size, SourceShare, draw_by_share, measure_shares


@dataclass(frozen=True, slots=True)
class Example:
    """A record as a person wrote it and as the model sees it."""

    record: Document
    rendered: Rendered
    last_row: Rendered | None = None
    """The last row of its conversation with train_on=each, which makes a row of each answer."""

    @property
    def declines(self) -> bool:
        """True when a trained answer declines the request."""
        return isinstance(self.record, Conversation) and is_declined(self.record)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens: examples with equal ids are equal to the model."""
        return tuple(self.rendered.ids)

    @property
    def conversation(self) -> tuple[int, ...]:
        """The tokens of the whole record: rows of one conversation have equal ones."""
        return tuple((self.last_row or self.rendered).ids)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Packed rows, and the portion of each source in them."""

    packing: Packing
    shares: list[SourceShare]

    def notes(self) -> Iterator[str]:
        """Yield notes on the rows for the user, one line each."""
        if any(share.origin.share for share in self.shares):
            yield from (share.note() for share in self.shares)
        yield from self.packing.counts.notes()


def render(records: Sequence[Document], renderer: ChatRenderer, config: FineTuneConfig) -> list[Example]:
    """Return the records as token ids, with the mask of the trained ones; several for a record with train_on=each."""
    last_only = config.train_on is not TrainOn.all
    examples: list[Example] = []
    for record in records:
        rows = rows_of(record, config.train_on)
        rendered = [renderer.document(row, last_only=last_only) for row in rows]
        examples += [Example(row, document, rendered[-1]) for row, document in zip(rows, rendered, strict=True)]
    return examples


def rows_of(record: Document, train_on: TrainOn) -> list[Document]:
    """Return the record; with train_on=each, a conversation for each trained answer, which is its last turn.

    Templates may write a turn differently once others follow. Here each answer follows the prompt that asks for it,
    and is trained once: a token weighs what it weighs with train_on=all.
    """
    if train_on is not TrainOn.each or isinstance(record, Text):
        return [record]
    rows: list[Document] = [
        replace(record, messages=(*map(_as_context, record.messages[:index]), message))
        for index, message in enumerate(record.messages)
        if message["role"] == "assistant" and message.get("train", True)
    ]
    return rows or [record]  # counted as one without a trained token


def _as_context(message: Message) -> Message:
    return {**message, "train": False} if message["role"] == "assistant" else message


def render_examples(records: Sequence[Document], tokenizer: Any, config: FineTuneConfig) -> list[Example]:
    """Render ``records`` and read each mask back; raises BadInput for a record that fails either."""
    last_only = config.train_on is not TrainOn.all
    examples = render(records, ChatRenderer(tokenizer), config)
    for each in examples:
        if isinstance(each.record, Text):
            continue  # every token is trained, and a tokenizer may be unable to spell every character of a raw text
        if fault := mask_fault(each.record, each.rendered, tokenizer, last_only=last_only):
            fix = "Use another chat template (model.chat_template=FILE), or look at it with posttrain tokens"
            raise BadInput(Problem(where=each.record.where, what=f"the mask is wrong: {fault}", fix=fix))
    return examples


def split_eval(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split ``examples`` into those to train and a seeded ``share`` for the eval loss.

    Equal examples stay on one side, or trained records would be measured, and so do all rows of a conversation; each
    is measured once. Raises BadInput when nothing is left to train.
    """
    if share == 0:
        return list(examples), []
    distinct = {example.conversation for example in examples}
    count = max(1, round(share * len(distinct)))
    if count == len(distinct):
        what = f"takes all of {count} different records, and leaves none to train"
        raise BadInput(Problem(where="eval_share", what=what, fix="Lower eval_share, or give eval_data"))
    chosen = set(random.Random(f"eval/{seed}").sample(sorted(distinct), count))
    trained = [example for example in examples if example.conversation not in chosen]
    measured = {example.ids: example for example in examples if example.conversation in chosen}
    also = {example.ids for example in trained}  # two conversations may begin with one question and one answer
    return trained, [example for ids, example in measured.items() if ids not in also]


def count_shared(trained: Iterable[Example], eval_examples: Iterable[Example]) -> int:
    """Count the ``eval_examples`` that are trained as well."""
    known = {example.ids for example in trained}
    return sum(example.ids in known for example in eval_examples)


def make_evaluation(eval_examples: Sequence[Example], config: FineTuneConfig) -> Evaluation:
    """Return the evaluation on ``eval_examples``, cut as in training; raises BadInput when none has a trained token."""
    answers = _rows([each for each in eval_examples if not each.declines], config)
    refusals = _rows([each for each in eval_examples if each.declines], config)
    if eval_examples and not (answers or refusals):
        what = f"no trained token in {len(eval_examples)} eval records, cut to {config.sequence_length} tokens"
        raise BadInput(Problem(where="eval_data", what=what, fix="Raise sequence_length"))
    return Evaluation(rows=[*answers, *refusals], refusals=len(refusals), config=config)


def mix_rows(records: Sequence[Document], rendered: Sequence[Rendered], config: FineTuneConfig, seed: int) -> Mixture:
    """Mix the records of a stage by the shares of their sources, and pack them; ``rendered`` holds their token ids.

    Raises:
        BadInput: Nothing is trained, a source cannot have its share, or a record is too long under overlong=reject.
    """
    # a source's share is one of tokens as rows hold them, so sizes are counted after cutting
    sizes = [_size(document, config) for document in rendered]
    taken = draw_by_share(records, sizes, seed)
    chosen = [rendered[index] for index in taken]
    packing = pack(chosen, config.sequence_length, packing=config.packing, overlong=config.overlong)
    return Mixture(packing, measure_shares(records, sizes, taken))


def _rows(examples: Sequence[Example], config: FineTuneConfig) -> list[PackedRow]:
    """Return a row for each example, or piece of one, with a trained token."""
    length, overlong = config.sequence_length, config.overlong
    usable = [each.rendered for each in examples if fit(each.rendered, length, overlong).trained]
    return pack(usable, length, packing=False, overlong=overlong).rows if usable else []


def _size(document: Rendered, config: FineTuneConfig) -> Size:
    fitted = fit(document, config.sequence_length, config.overlong)
    return Size(fitted.tokens, fitted.trained)
