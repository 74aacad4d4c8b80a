"""The sizes of a stage's records, from the first rows of its files: for a plan, which reads no data as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.config.schema import Source
from posttrain.data.files import local_files
from posttrain.data.mixing import count_records
from posttrain.data.reading import read_source
from posttrain.data.records import Conversation, Feedback, Message, Preference, Question, Record, Text
from posttrain.data.urls import is_url
from posttrain.errors import BadInput

SAMPLE = 100
"""Records of each source that are looked at."""
LARGEST = 64_000_000
"""Bytes of a file that is read as a whole to reach its first row; of larger ones no row is read."""
WHOLE = (".parquet", ".zst", ".gz")
"""Endings of files that are read as a whole, or unpacked."""
QUICK_TOKENIZER = 4_000_000
"""Bytes of the largest tokenizer that is loaded: a larger one takes longer than the rest of a plan."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of one record, in characters."""

    shared: int
    """Characters before the answers: of the prompt, or of the whole conversation where it has no part of its own."""
    answers: tuple[int, ...] = ()
    """Characters of each answer to the prompt."""
    trained: int
    """Characters whose tokens are scored by the loss."""
    turns: int
    """Turns, each of which the chat template puts into a frame of its own."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a stage's records."""

    records: int
    """Records of an epoch."""
    sample: tuple[Size, ...]
    """Sizes of some of them."""
    text: str
    """Some of their text, for the number of characters that a token has."""


def read_sizes(sources: Sequence[Source], shape: str) -> Sizes | None:
    """Return the sizes of records that lie on this machine; None where they do not, or cannot be read."""
    records = count_records(sources)
    if not records:
        return None
    found: list[Record] = []
    try:
        for source in sources:
            if not _is_quick(source):
                return None
            found += islice(read_source(source, shape), SAMPLE)
    except (BadInput, OSError):  # a run names what is wrong with them
        return None
    if not found:
        return None
    texts = [content for record in found for content in _contents(record)]
    return Sizes(records=records, sample=tuple(map(_size, found)), text="\n".join(texts)[:20_000])


def _is_quick(source: Source) -> bool:
    paths = None if is_url(source.path) else local_files(source.path)
    return bool(paths) and all(path.suffix not in WHOLE or path.stat().st_size <= LARGEST for path in paths or ())


def _size(record: Record) -> Size:
    if isinstance(record, Text):
        return Size(shared=len(record.text), trained=len(record.text), turns=0)
    if isinstance(record, Conversation):
        trained = _length(each for each in record.messages if each.get("role") == "assistant")
        return Size(shared=_length(record.messages), trained=trained, turns=len(record.messages))
    answers = tuple(map(_length, _answers(record)))
    return Size(shared=_length(record.prompt), answers=answers, trained=sum(answers), turns=1 + len(record.prompt))


def _answers(record: Preference | Feedback | Question) -> tuple[tuple[Message, ...], ...]:
    if isinstance(record, Preference):
        return record.chosen, record.rejected
    return (record.completion,) if isinstance(record, Feedback) else ()


def _contents(record: Record) -> Iterator[str]:
    if isinstance(record, Text):
        yield record.text
        return
    parts = (record.messages,) if isinstance(record, Conversation) else (record.prompt, *_answers(record))
    yield from (str(each.get("content") or "") for part in parts for each in part)


def _length(messages: Iterable[Message]) -> int:
    return sum(map(_characters, messages))


def _characters(message: Message) -> int:
    calls: Any = message.get("tool_calls")
    return len(str(message.get("content") or "")) + (len(str(calls)) if calls else 0)


def characters_per_token(text: str, model: str) -> float | None:
    """Return the characters of a token by the tokenizer in a local folder; None for a large one, or for none."""
    from tokenizers import Tokenizer

    path = Path(model).expanduser() / "tokenizer.json"
    try:
        if path.stat().st_size > QUICK_TOKENIZER:
            return None
        count = len(Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False))
    except Exception:  # of the library's own, which has no type for a file that it cannot read
        return None
    return len(text) / count if count else None
