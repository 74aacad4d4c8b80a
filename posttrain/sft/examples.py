"""Records rendered into tokens, each mask read back, and split into rows to train on and documents of the eval loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import numpy as np

from posttrain.data.declines import is_declined
from posttrain.data.records import Conversation, Document, Message, Text
from posttrain.engine.config import FineTuneConfig, TrainOn
from posttrain.engine.evaluation import Evaluation
from posttrain.engine.held_out import choose_held_out
from posttrain.errors import BadInput, Problem
from posttrain.tokens.chat import ChatRenderer
from posttrain.tokens.masks import MaskProof
from posttrain.tokens.overlong import cut
from posttrain.tokens.packing import PackedRow, Packing, pack
from posttrain.tokens.shares import Sizes, SourceShare, draw_by_share, measure_shares
from posttrain.tokens.table import Documents, TableRow, TokenTable


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


class Rendering:
    """The way from a record to its rows: a tokenizer with its template, and the turns to train."""

    def __init__(self, tokenizer: Any, train_on: TrainOn, *, proven: bool = True) -> None:
        """Take a tokenizer; ``proven`` reads each mask back."""
        self._train_on, self._renderer = train_on, ChatRenderer(tokenizer)
        self._proof = MaskProof(tokenizer) if proven else None

    def rows(self, records: Iterable[Document]) -> Iterator[TableRow]:
        """Yield the rows of each record: one, or several with train_on=each.

        Raises BadInput for the first record that cannot be rendered, or whose proof fails.
        """
        parts, read = tee((row, after) for record in records for row, after in _numbered(record, self._train_on))
        last_only = self._train_on is not TrainOn.all
        documents = self._renderer.documents((row for row, _ in read), last_only=last_only)
        for (row, after), rendered in zip(parts, documents, strict=True):
            chat = isinstance(row, Conversation)
            # every token of a raw text is trained, and a tokenizer may be unable to spell every character of one
            if chat and self._proof is not None:
                self._check(row, self._proof.fault(row, rendered, last_only=last_only))
            yield TableRow(
                rendered=rendered,
                origin=row.origin,
                flag=isinstance(row, Conversation) and is_declined(row),
                chat=chat,
                after=after,
            )

    def table(self, records: Iterable[Document]) -> TokenTable:
        """Return the rows of all records, in memory."""
        return TokenTable.of(self.rows(records))

    def _check(self, record: Document, fault: str | None) -> None:
        if fault is not None:
            fix = "Use another chat template (model.chat_template=FILE), or look at it with posttrain tokens"
            raise BadInput(Problem(where=record.where, what=f"the mask is wrong: {fault}", fix=fix))


def _numbered(record: Document, train_on: TrainOn) -> Iterator[tuple[Document, int]]:
    """Yield the rows of a record, each with the number of those that follow."""
    rows = rows_of(record, train_on)
    yield from zip(rows, reversed(range(len(rows))), strict=True)


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


def split_eval(
    documents: Documents, share: float, seed: int, clusters: Mapping[str, int] | None = None
) -> tuple[Documents, Documents]:
    """Split ``documents`` into those to train and a seeded ``share`` for the eval loss.

    Equal documents stay on one side, or trained records would be measured, and so do all rows of a conversation, and
    those of a cluster; each is measured once. Raises BadInput when nothing is left to train.
    """
    nothing = np.empty(0, np.int64)
    if share == 0:
        return documents, documents.take(nothing)
    conversations = documents.records
    digests = conversations.digests
    distinct = conversations.take(np.array(list({digest: place for place, digest in enumerate(digests)}.values())))
    order = distinct.take(np.fromiter(distinct.in_order(), np.int64, len(distinct))).digests
    known = clusters or {}
    places = enumerate(digests) if known else ()
    alike = [(digest, known[where]) for place, digest in places if (where := documents.where(place)) in known]
    chosen = choose_held_out(order, share, seed, "records", alike)
    measured_M = np.array([digest in chosen for digest in digests])
    trained, held_out = documents.take(~measured_M), documents.take(measured_M)
    also = set(trained.digests)  # two conversations may begin with one question and one answer
    # of equal ones the last, at the place of the first
    last = {digest: place for place, digest in enumerate(held_out.digests) if digest not in also}
    return trained, held_out.take(np.array(list(last.values()), np.int64))


def count_shared(trained: Documents, measured: Iterable[Documents]) -> int:
    """Count the ``measured`` documents that are trained as well."""
    found = [digest for documents in measured for digest in documents.digests]
    if not found:  # of a million documents the digests take a second
        return 0
    known = set(trained.digests)
    return sum(digest in known for digest in found)


def make_evaluation(measured: Sequence[Documents], config: FineTuneConfig) -> Evaluation:
    """Return the evaluation on documents, cut as in training; raises BadInput when none has a trained token."""
    answers, refusals = (
        [row for each in measured for row in _rows(each.take(each.column("flag") == declines), config)]
        for declines in (False, True)
    )
    count = sum(map(len, measured))
    if count and not (answers or refusals):
        what = f"no trained token in {count} eval records, cut to {config.sequence_length} tokens"
        raise BadInput(Problem(where="eval_data", what=what, fix="Raise sequence_length"))
    return Evaluation(rows=[*answers, *refusals], refusals=len(refusals), config=config)


def mix_rows(documents: Documents, config: FineTuneConfig, seed: int) -> Mixture:
    """Mix the documents of a stage by the shares of their sources, and pack them.

    Raises:
        BadInput: Nothing is trained, a source cannot have its share, or a record is too long under overlong=reject.
    """
    # a source's share is one of tokens as rows hold them, so sizes are counted after cutting
    pieces = cut(documents, config.sequence_length, config.overlong)
    sizes = Sizes(
        origins=documents.table.origins,
        numbers=documents.column("origin"),
        tokens=pieces.tokens_of_documents,
        trained=pieces.trained_of_documents,
    )
    taken = draw_by_share(sizes, seed)
    chosen = documents.take(taken)
    packing = pack(chosen, config.sequence_length, packing=config.packing, overlong=config.overlong)
    return Mixture(packing, measure_shares(sizes, taken))


def _rows(documents: Documents, config: FineTuneConfig) -> list[PackedRow]:
    """Return a row for each document, or piece of one, with a trained token."""
    length, overlong = config.sequence_length, config.overlong
    usable = documents.take(cut(documents, length, overlong).pieces_of_documents > 0)
    return list(pack(usable, length, packing=False, overlong=overlong).rows) if len(usable) else []
