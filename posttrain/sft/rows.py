"""The rows of supervised fine-tuning: records rendered, mixed by the shares of their sources, packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.data.records import Document
from posttrain.engine.config import FineTuneConfig, TrainOn
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.overlong import fit
from posttrain.tokens.packing import Packing, pack
from posttrain.tokens.shares import Size, SourceShare, draw_by_share, measure_shares


@dataclass(frozen=True, slots=True)
class Mixture:
    """Packed rows, and what they hold of each source."""

    packing: Packing
    shares: list[SourceShare]

    def notes(self) -> Iterator[str]:
        """What a person should know before the rows are trained on, one line each."""
        if any(share.origin.share for share in self.shares):
            yield from (share.note() for share in self.shares)
        yield from self.packing.counts.notes()


def render(records: Sequence[Document], renderer: ChatRenderer, config: FineTuneConfig) -> list[Rendered]:
    """The records as token ids with the mask of what the settings train."""
    last_only = config.train_on is TrainOn.last
    return [renderer.document(record, last_only=last_only) for record in records]


def mixture(records: Sequence[Document], documents: Sequence[Rendered], config: FineTuneConfig, seed: int) -> Mixture:
    """The rows that a stage trains on, from all records of its sources and what they were rendered into.

    Raises:
        BadInput: Nothing is trained, a source cannot have its share, or a record is too long and that is refused.
    """
    sizes = [_size(document, config) for document in documents]
    taken = draw_by_share(records, sizes, seed)
    chosen = [documents[index] for index in taken]
    packing = pack(chosen, config.sequence_length, packing=config.packing, overlong=config.overlong)
    return Mixture(packing, measure_shares(records, sizes, taken))


def _size(document: Rendered, config: FineTuneConfig) -> Size:
    fitted = fit(document, config.sequence_length, config.overlong)
    return Size(fitted.tokens, fitted.trained)
