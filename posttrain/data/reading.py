"""Rows and records of one source of a recipe, and the digest of all sources.

The options of a source act here and nowhere else: ``select_rows`` picks rows and ``count_selected`` counts them,
``read_source`` makes records of them, ``data_digest`` covers every option. ``weight`` and ``share`` concern several
sources; they act in ``data.mixing`` and ``tokens.shares``. ``data.plugin`` checks the values of all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.config.schema import Source
from posttrain.data.contents import Contents
from posttrain.data.files import count_rows, format_of, local_files, read_found
from posttrain.data.hub import copy_hub, read_copy, read_hub
from posttrain.data.records import Record
from posttrain.data.rows import BadRow, Found, RawRow, Rows, bad_row, strict
from posttrain.data.shapes import to_record
from posttrain.data.urls import copy_url, is_url
from posttrain.errors import BadInput, reject, shown, suggest

GROUP = "group"
"""Key by which rows are capped, where ``columns`` names one."""
_ABSENT = object()


def select_rows(source: Source) -> Rows:
    """Yield ``(where, row)`` for the rows of ``source`` selected by its options, under the keys of its files.

    An existing path is read from disk (a file, a directory or a pattern, in the order of the names), any other name is
    streamed from the hub.

    Raises:
        BadInput: The source cannot be found or read; names file and line.
    """
    return strict(islice(_all_rows(source, None), source.limit))


def count_selected(source: Source) -> int | None:
    """Return the number of rows selected by the options; None when it takes reading them.

    Uncounted files and hub datasets are taken to hold as many rows as their ``limit``.
    """
    paths = [] if is_url(source.path) else local_files(source.path) or []
    found = [count_rows(path) for path in paths]
    known = [count for count in found if count is not None]
    if not found or len(known) < len(found):
        return source.limit
    return sum(known) if source.limit is None else min(sum(known), source.limit)


def read_source(source: Source, shape: str, cache: Path | None = None) -> Iterator[Record]:
    """Yield the records of ``source`` in the shape for a stage.

    Raises:
        BadInput: The source cannot be found or read, or a record has no usable shape; names file and line.
    """
    return strict(read_records(source, shape, cache))


def read_records(source: Source, shape: str, cache: Path | None = None) -> Iterator[Record | BadRow]:
    """Yield the records of ``source`` in the shape for a stage, and its rows that make none.

    ``columns`` renames keys first, and ``limit`` counts both.

    Args:
        source: Path or hub name, with options.
        shape: One of RECORD_SHAPES.
        cache: Folder of copies of hub datasets and URLs; without it the one is streamed and the other rejected.

    Raises:
        BadInput: The source cannot be found, or a file cannot be read to its end.
    """
    for found in islice(_all_rows(source, cache), source.limit):
        yield found if isinstance(found, BadRow) else _record(source, shape, *found)


def read_with_rows(source: Source, shape: str) -> Iterator[tuple[Record, RawRow]]:
    """Yield the records of ``source`` as ``read_source`` does, each with its row under the keys of its file."""
    for where, row in select_rows(source):
        record = _record(source, shape, where, row)
        if isinstance(record, BadRow):
            raise BadInput(record.problem())
        yield record, row


def _record(source: Source, shape: str, where: str, row: RawRow) -> Record | BadRow:
    kind = "columns"
    try:
        renamed = _rename(row, source.columns, where)
        kind = "shape"
        record = to_record(renamed, source.format, shape, where)
        group = _group(renamed, where) if GROUP in source.columns else ""
    except BadInput as error:
        return bad_row(error, kind)
    # A key renamed to one that nothing reads is set aside on purpose, as is one of which columns take a part.
    aside = {*source.columns, *(name.split(".")[0] for name in source.columns.values())}
    unread = tuple(key for key in record.unread if key not in aside)
    return record if unread == record.unread and not group else replace(record, unread=unread, group=group)


def _group(row: RawRow, where: str) -> str:
    """Return the group of a row, a text or a number."""
    value = row[GROUP]
    if not isinstance(value, str | int | float):
        reject(where, f"the group is {shown(value)}", "Name a key with a text or a number: columns: {group: topic}")
    return str(value)


def data_digest(sources: Sequence[Source], cache: Path | None = None) -> str:
    """Return the SHA-256 over the content of all files and all options of their sources.

    Paths do not count: moved files keep their digest. With ``cache``, hub datasets and URLs are copied first and count
    by their content, and digests are remembered there; without it, a hub dataset counts by its name and options.
    """
    contents = Contents(None if cache is None else cache / "digests.json")
    described = [{"options": _options(source), "content": _content(source, contents, cache)} for source in sources]
    contents.save()
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def places(sources: Sequence[Source], cache: Path | None = None) -> list[list[str]]:
    """Return the names of the files of each source in messages; that of a hub dataset is its own."""
    found = [_files(source, cache) for source in sources]
    return [[source.path, *(place for _, place in files or ())] for source, files in zip(sources, found, strict=True)]


def endings(sources: Sequence[Source], cache: Path | None) -> set[str]:
    """Return the endings of all files of the sources; hub datasets have none."""
    return {path.suffix for source in sources for path, _ in _files(source, cache) or ()}


def remote(sources: Sequence[Source]) -> list[str]:
    """Return the hub datasets and URLs among the sources, which the first start copies."""
    return [source.path for source in sources if is_url(source.path) or local_files(source.path) is None]


def _all_rows(source: Source, cache: Path | None) -> Iterator[Found]:
    files = _files(source, cache)
    if files is not None:
        for path, place in files:
            yield from read_found(path, place)
    elif cache is None:
        yield from read_hub(source)
    else:
        yield from read_copy(source, copy_hub(source, cache))


def _files(source: Source, cache: Path | None) -> list[tuple[Path, str]] | None:
    """Return the files of a source with their names in messages; None for a hub dataset."""
    if is_url(source.path):
        if cache is None:
            reject(source.path, "is a URL, which only the data of a stage may be", "Give a file")
        return copy_url(source.path, cache)
    paths = local_files(source.path)
    return None if paths is None else [(path, str(path)) for path in paths]


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


def _content(source: Source, contents: Contents, cache: Path | None) -> str | list[str]:
    files = _files(source, cache)
    if files is None and cache is None:
        return source.path
    paths = [copy_hub(source, cache)] if files is None and cache is not None else [path for path, _ in files or ()]
    return [contents.digest(path) + _reader(path) for path in paths]


def _reader(path: Path) -> str:
    """Return the identity of the plugin's reader of a file; empty for the formats of posttrain."""
    known = format_of(path)
    return "" if known is None or not known.identity else f" {known.identity}"
