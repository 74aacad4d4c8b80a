"""From a source of a recipe to records, and to the digest of what was read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from posttrain.config.schema import Source
from posttrain.data.files import Row, Rows, local_files, rows
from posttrain.data.records import Record
from posttrain.data.shapes import to_record
from posttrain.errors import BadInput, Problem, suggest


def read_source(source: Source, shape: str) -> Iterator[Record]:
    """Yield the records of ``source`` in the shape that a stage needs.

    A path that exists is read from disk (JSON, JSONL, Parquet, text, or a directory of them in the order of their
    names), anything else is streamed from the hub. ``columns`` renames keys before the shape is recognised, and
    ``limit`` keeps the first records.

    Args:
        source: What to read.
        shape: One of RECORD_SHAPES.

    Raises:
        BadInput: The source cannot be found or read, or a record has no usable shape; names file and line.
    """
    if source.limit is not None and source.limit < 1:
        what = f"limit is {source.limit}"
        raise BadInput(Problem(where=source.path, what=what, fix="Use at least 1, or null for all"))
    for where, row in islice(_rows(source), source.limit):
        yield to_record(_renamed(row, source.columns, where), source.format, shape, where)


def data_digest(sources: Sequence[Source]) -> str:
    """SHA-256 over the content of all files and the options that change what is read from them.

    Paths do not count: moved files keep their digest. A hub dataset counts by its name and options, of which
    ``revision`` pins its content.
    """
    described = [{"options": _options(source), "content": _content(source)} for source in sources]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _rows(source: Source) -> Rows:
    files = local_files(source.path)
    if files is None:
        yield from _hub_rows(source)
        return
    for path in files:
        yield from rows(path)


def _hub_rows(source: Source) -> Rows:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.path):
        what = "no such file or directory, and not a hub name"
        raise BadInput(Problem(where=source.path, what=what, fix="A hub dataset is named owner/name"))
    from datasets import load_dataset

    options = {"name": source.subset, "split": source.split, "revision": source.revision}
    index = -1
    try:
        for index, row in enumerate(load_dataset(source.path, streaming=True, **options)):
            yield f"{source.path}[{index}]", row
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise _hub_failure(source, error) from error
    if index < 0:
        raise BadInput(Problem(where=source.path, what=f"split {source.split!r} of the hub dataset holds no records"))


def _hub_failure(source: Source, error: Exception) -> BadInput:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"no such file or directory, and the hub dataset (split {source.split!r}) cannot be read: {reason}"
    return BadInput(Problem(where=source.path, what=what, fix="Check name, split, subset, revision and the network"))


def _renamed(row: Row, columns: dict[str, str], where: str) -> Row:
    absent = [name for name in columns.values() if name not in row]
    if absent:
        what = f"columns names {absent[0]!r}, which the record does not have"
        raise BadInput(Problem(where=where, what=what, fix=suggest(absent[0], row)))
    kept = {key: value for key, value in row.items() if key not in columns.values()}
    return kept | {target: row[name] for target, name in columns.items()}


def _options(source: Source) -> dict[str, Any]:
    return {
        "format": source.format.value,
        "columns": dict(source.columns),
        "limit": source.limit,
        "weight": float(source.weight),
        "share": source.share,
        "split": source.split,
        "subset": source.subset,
        "revision": source.revision,
    }


def _content(source: Source) -> str | list[str]:
    files = local_files(source.path)
    if files is None:
        return source.path
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests
