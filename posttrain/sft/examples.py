"""Records and what they are rendered into, each mask read back; parted into what is trained and what is held out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.records import Conversation, Document, Text
from posttrain.engine.config import FineTuneConfig, TrainOn
from posttrain.engine.evaluation import Evaluation
from posttrain.errors import BadInput, Problem
from posttrain.sft.refusals import refuses
from posttrain.sft.rows import render
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.masks import mask_fault
from posttrain.tokens.overlong import fit
from posttrain.tokens.packing import PackedRow, pack


@dataclass(frozen=True, slots=True)
class Example:
    """A record as a person wrote it and as the model sees it."""

    record: Document
    rendered: Rendered

    @property
    def refusal(self) -> bool:
        """Whether an answer that is trained declines what was asked."""
        return isinstance(self.record, Conversation) and refuses(self.record)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens: two examples with the same are the same to the model."""
        return tuple(self.rendered.ids)


def examples_of(records: Sequence[Document], tokenizer: Any, config: FineTuneConfig) -> list[Example]:
    """Render ``records``. Raises BadInput when one cannot be rendered, or its mask is not that of its answers."""
    last_only = config.train_on is TrainOn.last
    rendered = render(records, ChatRenderer(tokenizer), config)
    examples = [Example(record, document) for record, document in zip(records, rendered, strict=True)]
    for each in examples:
        if isinstance(each.record, Text):
            continue  # all of it is trained, and a tokenizer need not be able to spell every character of a raw text
        if fault := mask_fault(each.record, each.rendered, tokenizer, last_only=last_only):
            fix = "Use another chat template (model.chat_template=FILE), or look at it with posttrain tokens"
            raise BadInput(Problem(where=each.record.where, what=f"the mask is wrong: {fault}", fix=fix))
    return examples


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Part ``examples`` into those that are trained and a seeded ``share`` that is not.

    Equal examples stay on one side, or the loss of those held out would be that of trained ones; each is held out once.
    Raises BadInput when nothing is left to train.
    """
    if share == 0:
        return list(examples), []
    distinct = {example.ids: example for example in examples}
    count = max(1, round(share * len(distinct)))
    if count == len(distinct):
        what = f"holds out all of {count} different records"
        raise BadInput(Problem(where="eval_share", what=what, fix="Hold out less, or give eval_data"))
    chosen = set(random.Random(f"eval/{seed}").sample(sorted(distinct), count))
    trained = [example for example in examples if example.ids not in chosen]
    return trained, [example for ids, example in distinct.items() if ids in chosen]


def shared(trained: Iterable[Example], held_out: Iterable[Example]) -> int:
    """How many of ``held_out`` are trained as well."""
    known = {example.ids for example in trained}
    return sum(example.ids in known for example in held_out)


def evaluation_of(held_out: Sequence[Example], config: FineTuneConfig) -> Evaluation:
    """The evaluation on ``held_out``, cut as in training; raises BadInput when none of them has a trained token."""
    answers, refusals = (_rows([each for each in held_out if each.refusal is kind], config) for kind in (False, True))
    if held_out and not (answers or refusals):
        what = f"no trained token in {len(held_out)} held-out records, cut to {config.sequence_length} tokens"
        raise BadInput(Problem(where="eval_data", what=what, fix="Raise sequence_length"))
    return Evaluation(rows=[*answers, *refusals], refusals=len(refusals), config=config)


def _rows(examples: Sequence[Example], config: FineTuneConfig) -> list[PackedRow]:
    """A row for each example, or piece of one, in which something is trained."""
    length, overlong = config.sequence_length, config.overlong
    usable = [each.rendered for each in examples if fit(each.rendered, length, overlong).trained]
    return pack(usable, length, packing=False, overlong=overlong).rows if usable else []
