"""Rows and records of one source of a recipe, and the digest of all sources.

The options of a source act here and nowhere else: ``select_rows`` picks rows and ``count_selected`` counts them,
``read_source`` makes records of them, ``data_digest`` covers every option. ``weight`` and ``share`` concern several
sources; they act in ``data.mixing`` and ``tokens.shares``. ``data.plugin`` checks the values of all of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from enum import Enum
from itertools import islice
from typing import Any

from posttrain.config.schema import Source
from posttrain.data.files import count_rows, local_files, read_found
from posttrain.data.records import Record
from posttrain.data.rows import BadRow, Found, RawRow, Rows, bad_row, strict
from posttrain.data.shapes import to_record
from posttrain.data.tables import drop_filled
from posttrain.errors import BadInput, Problem, reject, suggest

_ABSENT = object()


def select_rows(source: Source) -> Rows:
    """Yield ``(where, row)`` for the rows of ``source`` selected by its options, under the keys of its files.

    An existing path is read from disk (a file, a directory or a pattern, in the order of the names), any other name is
    streamed from the hub.

    Raises:
        BadInput: The source cannot be found or read; names file and line.
    """
    return strict(islice(_all_rows(source), source.limit))


def count_selected(source: Source) -> int | None:
    """Return the number of rows selected by the options; None when it takes reading them.

    Uncounted files and hub datasets are taken to hold as many rows as their ``limit``.
    """
    found = [count_rows(path) for path in local_files(source.path) or []]
    known = [count for count in found if count is not None]
    if not found or len(known) < len(found):
        return source.limit
    return sum(known) if source.limit is None else min(sum(known), source.limit)


def read_source(source: Source, shape: str) -> Iterator[Record]:
    """Yield the records of ``source`` in the shape for a stage.

    Raises:
        BadInput: The source cannot be found or read, or a record has no usable shape; names file and line.
    """
    return strict(read_records(source, shape))


def read_records(source: Source, shape: str) -> Iterator[Record | BadRow]:
    """Yield the records of ``source`` in the shape for a stage, and its rows that make none.

    ``columns`` renames keys first, and ``limit`` counts both.

    Args:
        source: Path or hub name, with options.
        shape: One of RECORD_SHAPES.

    Raises:
        BadInput: The source cannot be found, or a file cannot be read to its end.
    """
    for found in islice(_all_rows(source), source.limit):
        yield found if isinstance(found, BadRow) else _record(source, shape, *found)


def _record(source: Source, shape: str, where: str, row: RawRow) -> Record | BadRow:
    kind = "columns"
    try:
        renamed = _rename(row, source.columns, where)
        kind = "shape"
        record = to_record(renamed, source.format, shape, where)
    except BadInput as error:
        return bad_row(error, kind)
    # A key renamed to one that nothing reads is set aside on purpose, as is one of which columns take a part.
    aside = {*source.columns, *(name.split(".")[0] for name in source.columns.values())}
    unread = tuple(key for key in record.unread if key not in aside)
    return record if unread == record.unread else replace(record, unread=unread)


def data_digest(sources: Sequence[Source]) -> str:
    """Return the SHA-256 over the content of all files and all options of their sources.

    Paths do not count: moved files keep their digest. A hub dataset counts by its name and options; its ``revision``
    pins its content.
    """
    described = [{"options": _options(source), "content": _content(source)} for source in sources]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _all_rows(source: Source) -> Iterator[Found]:
    paths = local_files(source.path)
    if paths is None:
        yield from _read_hub(source)
        return
    for path in paths:
        yield from read_found(path)


def _read_hub(source: Source) -> Rows:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.path):
        reject(source.path, "no such file or directory, and not a hub name", "A hub dataset is named owner/name")
    from datasets import load_dataset

    options = {"name": source.subset, "split": source.split, "revision": source.revision}
    index = -1
    try:
        rows = load_dataset(source.path, streaming=True, **options)
        features = getattr(rows, "features", None)
        kinds = {} if features is None else {field.name: field.type for field in features.arrow_schema}
        for index, row in enumerate(rows):
            yield f"{source.path}[{index}]", {key: drop_filled(value, kinds.get(key)) for key, value in row.items()}
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise _hub_failure(source, error) from error
    if index < 0:
        reject(source.path, f"split {source.split!r} of the hub dataset holds no records")


def _hub_failure(source: Source, error: Exception) -> BadInput:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"no such file or directory, and the hub dataset (split {source.split!r}) cannot be read: {reason}"
    return BadInput(Problem(where=source.path, what=what, fix="Check name, split, subset, revision and the network"))


def _rename(row: RawRow, columns: dict[str, str], where: str) -> RawRow:
    taken = {target: _at(row, name) for target, name in columns.items()}
    absent = [columns[target] for target, value in taken.items() if value is _ABSENT]
    if absent:
        reject(where, f"columns names {absent[0]!r}, a key that the record lacks", suggest(absent[0], row))
    # All old keys leave before the new ones come, so that two columns can swap.
    kept = {key: value for key, value in row.items() if key not in columns.values()}
    return kept | taken


def _at(row: RawRow, name: str) -> Any:
    """Return the value of a key, or of a path of keys and of numbers in lists, such as ``turns.0.text``."""
    if name in row:
        return row[name]
    value: Any = row if "." in name else None
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def _options(source: Source) -> dict[str, Any]:
    """Return all options but the path; a new option enters the digest by being a field of Source."""
    apart = ("path", "on_policy")
    values = {option.name: getattr(source, option.name) for option in fields(source) if option.name not in apart}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    # weight=2 and weight=2.0 are one setting, but two texts in JSON.
    asked = {} if source.on_policy is None else {"on_policy": source.on_policy.identity()}
    return plain | asked | {"weight": float(source.weight)}


def _content(source: Source) -> str | list[str]:
    paths = local_files(source.path)
    if paths is None:
        return source.path
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests
