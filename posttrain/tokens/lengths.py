"""Lengths of rows in tokens: measured on a sample of each source, before anything is rendered.

Preparation counts characters, whatever the model; its tokenizer makes tokens of them. The texts alone count, without
what the chat template puts around them.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.config.preparation import Compared
from posttrain.config.schema import ModelConfig
from posttrain.data.records import Record
from posttrain.data.stored import origins_of
from posttrain.digests import file_digest
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.prepare.kept import Kept
from posttrain.prepare.ledger import Summary
from posttrain.prepare.rows import Row
from posttrain.saved import plain, read_as

FILE = "lengths.json"
"""Name of the file of measured lengths in the folder of a preparation."""
SAMPLE = 500
"""Rows of a source that are measured."""
LONGEST = 20_000
"""Characters of a row that are measured."""
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Content of FILE."""

    tokenizer: str
    """SHA-256 of the tokenizer's file."""
    tokens_per_character: list[float]
    """Of each source, in the order of the summary."""


def known_lengths(done: Kept, model: ModelConfig) -> Summary | None:
    """Return the counts with the lengths that were measured before; None where they have to be measured."""
    file = _tokenizer_file(model)
    if file is None:
        return done.summary
    try:
        found = read_as(Lengths, done.folder / FILE)
    except (FileNotFoundError, ArtifactDamaged):
        return None
    if found.tokenizer != file_digest(file):
        return None
    return replace(done.summary, tokens_per_character=found.tokens_per_character)


def measure_lengths(done: Kept, trained: Sequence[Record], model: ModelConfig) -> Summary:
    """Return the counts with measured lengths, and keep these; without them where the tokenizer cannot be read."""
    if (known := known_lengths(done, model)) is not None:
        return known
    file = _tokenizer_file(model)
    rates = [] if file is None else _rates(trained, file)
    if file is not None:
        lengths = Lengths(tokenizer=file_digest(file), tokens_per_character=rates)
        replace_text(done.folder / FILE, json.dumps(plain(lengths)))
    return replace(done.summary, tokens_per_character=rates)


def _rates(trained: Sequence[Record], file: Path) -> list[float]:
    from tokenizers import Tokenizer

    sources: dict[int, array[int]] = {}
    for at, origin in enumerate(origins_of(trained)):
        sources.setdefault(origin.number, array("q")).append(at)
    try:
        tokenizer = Tokenizer.from_file(str(file))
        return [_rate([trained[at] for at in _sample(places)], tokenizer) for places in sources.values()]
    except Exception:  # the library raises nothing narrower; whoever loads the model names the fault
        return []


def _rate(records: Sequence[Record], tokenizer: Any) -> float:
    texts = [Row(record).compared(Compared.both)[:LONGEST] for record in records]
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(each.ids) for each in found) / max(sum(map(len, texts)), 1)


def _sample(places: Sequence[int]) -> Sequence[int]:
    """Return SAMPLE of the places at even distances, or all when there are fewer."""
    return places[:: max(1, -(-len(places) // SAMPLE))]


def _tokenizer_file(model: ModelConfig) -> Path | None:
    """Return the tokenizer's file; None while it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    local = Path(model.path).expanduser()
    if local.is_dir():
        return local / TOKENIZER if (local / TOKENIZER).is_file() else None
    try:
        found = try_to_load_from_cache(model.path, TOKENIZER, revision=model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
