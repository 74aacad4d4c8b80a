"""Several sources become one list of records, each source as often as its weight says."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from posttrain.config.schema import Source
from posttrain.data.reading import read_source
from posttrain.data.records import Conversation, Origin, Record, Text
from posttrain.errors import BadInput, Problem


def mix(sources: Sequence[Source], shape: str, seed: int) -> list[Record]:
    """The records of all sources, one source after the other.

    A source of weight 2 gives each record twice, of weight 0.5 a random half, of weight 1.5 all and a random half;
    a fraction is rounded to whole records, at least one. The same seed takes the same records. Shares are left to the
    stage, which knows the tokens: documents know the source that they came from.

    Raises:
        BadInput: A weight is not a positive number, there is no source, or one cannot be read.
    """
    if not sources:
        raise BadInput(Problem(where="data", what="names no source of records"))
    problems = [_weight_problem(source) for source in sources if not 0 < source.weight < math.inf]
    if problems:
        raise BadInput(problems)
    mixed: list[Record] = []
    for number, source in enumerate(sources):
        origin = Origin(number=number, path=source.path, share=source.share or 0.0)
        records = [_from(record, origin) for record in read_source(source, shape)]
        mixed += _weighted(records, source.weight, random.Random(f"mix/{seed}/{number}"))
    return mixed


def _from(record: Record, origin: Origin) -> Record:
    return replace(record, origin=origin) if isinstance(record, Conversation | Text) else record


def _weighted(records: list[Record], weight: float, rng: random.Random) -> list[Record]:
    whole = math.floor(weight)
    part = round((weight - whole) * len(records))
    part = max(part, 1) if whole == 0 else part
    return records * whole + [records[index] for index in sorted(rng.sample(range(len(records)), part))]


def _weight_problem(source: Source) -> Problem:
    fix = "Use a number above 0, or remove the source"
    return Problem(where=source.path, what=f"weight is {source.weight}", fix=fix)
