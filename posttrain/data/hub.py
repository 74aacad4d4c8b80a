"""Hub datasets: streamed row by row, with a place for it into a local copy, from which every later start reads."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from posttrain.config.schema import Source
from posttrain.data.rows import RawRow, Rows
from posttrain.data.tables import drop_filled
from posttrain.digests import canonical, digest_of
from posttrain.disk import lock, replace_text
from posttrain.errors import ArtifactDamaged, BadInput, Problem, first_line, reject
from posttrain.saved import plain, read_as

ROWS_KEPT = 10_000
"""Rows after which a copy is made sure of: an interrupted one resumes there."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """The part of a copy that is sure."""

    rows: int = 0
    bytes: int = 0
    is_complete: bool = False
    position: dict[str, Any] = field(default_factory=dict)
    """The stream's own note of its place; empty when it has none."""


def read_hub(source: Source) -> Rows:
    """Yield the rows of a hub dataset as they come."""
    count = 0
    for row in _stream(source, _State())[1]:
        yield f"{source.path}[{count}]", row
        count += 1
    _require_rows(source, count)


def read_copy(source: Source, file: Path) -> Rows:
    """Yield the rows of a local copy."""
    with file.open("rb") as lines:
        for index, line in enumerate(lines):
            try:
                yield f"{source.path}[{index}]", json.loads(line)
            except (ValueError, RecursionError):
                reject(str(file), f"line {index + 1} of this copy is damaged", f"Delete {file.parent}")


def copy_hub(source: Source, cache: Path) -> Path:
    """Return the file with the rows of a hub dataset, streamed at the first call to its end or the source's ``limit``.

    It lies below ``cache`` under the name, subset, split, revision and limit. An interrupted copy resumes where it was;
    a whole one needs no network.

    Raises:
        BadInput: The dataset cannot be read, or holds no records.
    """
    options = [source.path, source.subset, source.split, source.revision, source.limit]
    folder = cache / "hub" / f"{source.path.replace('/', '--')}-{digest_of(options)[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    with (folder / ".lock").open("ab") as held:
        lock(held)  # another run that copies the same rows is waited for
        state = _state(folder, file)
        if not state.is_complete:
            with file.open("ab") as copy:
                state = _fill(source, state, copy, folder)
    _require_rows(source, state.rows)
    return file


def _fill(source: Source, state: _State, copy: IO[bytes], folder: Path) -> _State:
    """Append the rows behind those that are sure."""
    copy.truncate(state.bytes)
    copy.seek(state.bytes)
    rows, size = state.rows, state.bytes
    dataset, stream = _stream(source, state)
    left = None if source.limit is None else source.limit - rows
    try:
        for row in islice(stream, left):
            size += copy.write(_line(row))
            rows += 1
            if rows % ROWS_KEPT == 0:
                state = _keep(_State(rows=rows, bytes=size, position=_position(dataset)), copy, folder)
    except BadInput as error:
        kept = f"{state.rows:,} rows of it are kept: the same command resumes behind them"
        note = [Problem(where=source.path, what=kept)] if state.rows else []
        raise BadInput([*error.problems, *note]) from None
    return _keep(_State(rows=rows, bytes=size, is_complete=rows > 0), copy, folder)


def _keep(state: _State, copy: IO[bytes], folder: Path) -> _State:
    copy.flush()
    os.fsync(copy.fileno())
    replace_text(folder / "state.json", canonical(plain(state)))
    return state


def _state(folder: Path, file: Path) -> _State:
    """Return the state of a copy; one that its file does not bear out is none."""
    try:
        state = read_as(_State, folder / "state.json")
    except (ArtifactDamaged, FileNotFoundError):
        return _State()
    size = file.stat().st_size if file.exists() else 0
    is_sound = size == state.bytes if state.is_complete else size >= state.bytes
    return state if is_sound else _State()


def _stream(source: Source, state: _State) -> tuple[Any, Iterator[RawRow]]:
    """Return a dataset, and its rows behind those that are sure, without the fields that its table filled with null."""
    from datasets import load_dataset

    options = {"name": source.subset, "split": source.split, "revision": source.revision}
    with _named(source):
        dataset = load_dataset(source.path, streaming=True, **options)
        features = getattr(dataset, "features", None)
        kinds = {} if features is None else {field.name: field.type for field in features.arrow_schema}
        if state.position:
            dataset.load_state_dict(state.position)
    behind = dataset if state.position else islice(dataset, state.rows, None)
    return dataset, _rows(source, behind, kinds)


def _rows(source: Source, dataset: Iterable[RawRow], kinds: dict[str, Any]) -> Iterator[RawRow]:
    with _named(source):
        for row in dataset:
            yield {key: drop_filled(value, kinds.get(key)) for key, value in row.items()}


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """Raise BadInput for any failure of the hub, the network or the dataset's files."""
    try:
        yield
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        what = f"no such file or directory, and the hub dataset (split {source.split!r}) cannot be read: "
        fix = "Check name, split, subset, revision and the network"
        raise BadInput(Problem(where=source.path, what=what + first_line(error), fix=fix)) from error


def _position(dataset: Any) -> dict[str, Any]:
    return dict(dataset.state_dict()) if hasattr(dataset, "state_dict") else {}


def _require_rows(source: Source, count: int) -> None:
    if not count:
        reject(source.path, f"split {source.split!r} of the hub dataset holds no records")


def _line(row: RawRow) -> bytes:
    """Return a row as a line of JSON; what JSON cannot hold is named by its type, as only text is trained."""
    text = json.dumps(row, ensure_ascii=False, default=_as_text)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(row, default=_as_text).encode() + b"\n"


def _as_text(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else f"<{type(value).__name__}>"
