"""Filling of a store: several processes render records piece by piece; the pieces are joined in their order.

The pieces are the same whoever renders them, so the bytes of a store do not depend on the number of processes. A
piece is whole or absent: after a kill the next fill makes the missing ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.records import Origin
from posttrain.digests import digest_of
from posttrain.disk import naming, sync, write_synced
from posttrain.environment import cores
from posttrain.errors import ArtifactDamaged, BadInput, Interrupted, Problem
from posttrain.host.supervisor import die_with
from posttrain.tokens.table import ROW, TEXTS, TableRow, TokenTable

PIECE = 500
"""Records of a piece, the least work that a killed fill loses."""
MANIFEST = "manifest.json"
ARRAYS: dict[str, np.dtype[Any]] = {
    "ids": np.dtype("<i4"),
    "mask": np.dtype("?"),
    "rows": ROW,
    "places": np.dtype("u1"),
}
"""The arrays of a table by name, each a file."""
POLL_SECONDS = 0.2
"""Seconds between two looks for a request to stop."""


@dataclass(frozen=True, kw_only=True)
class Fill:
    """The work behind a store: how records become rows, and whom to tell."""

    records: Sequence[Any]
    rows: Callable[[Sequence[Any]], Iterable[TableRow]]
    """Renders records, in their order; raises BadInput for the first bad one."""
    note: Callable[[str], None] = lambda text: None
    """Gets a line for the user."""
    part: Callable[[int, int, str], None] = lambda done, total, what: None
    """Gets the number of records done and their total, after each piece."""
    stop_requested: Callable[[], bool] = lambda: False
    workers: int = 1
    """Processes that render."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of a fill, in a folder."""

    folder: Path
    fill: Fill

    @property
    def paths(self) -> list[Path]:
        """The file of each piece."""
        return [self.folder / f"{number}.piece" for number in range(-(-len(self.fill.records) // PIECE))]

    def make(self, number: int) -> tuple[Problem, ...]:
        """Render one piece unless it is there; return the problems of its first bad record."""
        if _piece_of(self.paths[number]) is not None:
            return ()
        try:
            records = self.fill.records[number * PIECE : (number + 1) * PIECE]
            _write_piece(self.paths[number], TokenTable.of(self.fill.rows(records)))
        except BadInput as error:
            return tuple(error.problems)
        return ()


def fill_store(folder: Path, place: Path, key: str, fill: Fill) -> None:
    """Render all records into pieces in ``folder``, and join them at ``place``.

    Raises:
        BadInput: A record cannot be rendered; the first one of all is named.
        Interrupted: A stop was requested, or a process was killed; the pieces stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # as a list: records that are read on demand would be read by each of the processes
    pieces = Pieces(folder, replace(fill, records=fill.records[:]))
    total = len(fill.records)
    with contextlib.closing(_made(pieces)) as made:
        for number, problems in enumerate(made):
            if problems:
                raise BadInput(list(problems))
            fill.part(min((number + 1) * PIECE, total), total, "record")
    joined = folder / "joined"
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    _join(pieces.paths, joined, key)
    joined.replace(place)
    sync(place.parent)
    shutil.rmtree(folder)


def count_workers(asked: int | None) -> int:
    """Return the number of processes that render: as asked, or one for each core that this process may use."""
    if sys.platform != "linux":  # elsewhere a fork is not safe once libraries run threads
        return 1
    return asked or cores()


def _made(pieces: Pieces) -> Generator[tuple[Problem, ...], None, None]:
    """Make all pieces, yield the problems of each in their order."""
    count = len(pieces.paths)
    workers = min(pieces.fill.workers, count)
    if workers <= 1:
        for number in range(count):
            _check_stop(pieces.fill)
            yield pieces.make(number)
        return
    # Forked: a process inherits tokenizer, template and records as they are. It renders and writes, nothing else; torch
    # and its devices are not touched.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin_worker, (os.getpid(), pieces))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads at a fork, see above
            futures = [pool.submit(_make, number) for number in range(count)]
        for future in futures:
            yield _result(future, pieces.fill)
    except BrokenProcessPool:
        what = "a process that renders records was killed, as the system does when memory runs out"
        raise Interrupted(f"{what}; set data_workers lower") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[tuple[Problem, ...]], fill: Fill) -> tuple[Problem, ...]:
    while True:
        with contextlib.suppress(TimeoutError):
            return future.result(timeout=POLL_SECONDS)
        _check_stop(fill)


def _check_stop(fill: Fill) -> None:
    if fill.stop_requested():
        raise Interrupted("stopped while records were rendered")


_pieces: Pieces
"""The work of this process, where it is one of several that render."""


def _begin_worker(parent: int, pieces: Pieces) -> None:
    global _pieces
    _pieces = pieces
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and lets each finish its piece
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _make(number: int) -> tuple[Problem, ...]:
    return _pieces.make(number)


def _write_piece(path: Path, table: TokenTable) -> None:
    """Write a table into one file, under a first line with its sizes and its hash."""
    parts = {name: getattr(table, name).tobytes() for name in ARRAYS}
    body = b"".join(parts.values())
    head = {
        "sizes": {name: len(part) for name, part in parts.items()},
        "sha256": hashlib.sha256(body).hexdigest(),
        "origins": [asdict(origin) for origin in table.origins],
        "texts": table.texts,
    }
    draft = path.with_suffix(".draft")
    with naming(draft):
        draft.write_bytes(json.dumps(head).encode() + b"\n" + body)
    draft.replace(path)


def _piece_of(path: Path) -> TokenTable | None:
    """Return the table in a piece; None when there is none or it is torn."""
    try:
        line, _, body = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        if head["sha256"] != hashlib.sha256(body).hexdigest():
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    ends = np.cumsum([head["sizes"][name] for name in ARRAYS]).tolist()
    arrays: dict[str, Any] = {
        name: np.frombuffer(body[end - head["sizes"][name] : end], kind)
        for (name, kind), end in zip(ARRAYS.items(), ends, strict=True)
    }
    return TokenTable(**arrays, origins=tuple(Origin(**each) for each in head["origins"]), texts=tuple(head["texts"]))


def _join(paths: Sequence[Path], place: Path, key: str) -> None:
    """Write the tables of all pieces end to end into ``place``, and its manifest last."""
    origins: dict[Origin, int] = {}
    texts: list[str] = []
    tokens = places = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(_Hashed(place / f"{name}.bin")) for name in ARRAYS}
        for path in paths:
            if (piece := _piece_of(path)) is None:
                raise ArtifactDamaged(f"{path} does not hold what was written to it: the disk is at fault")
            numbers = np.array([origins.setdefault(origin, len(origins)) for origin in piece.origins], np.int32)
            rows = piece.rows.copy()
            rows["end"] += tokens
            rows["place_end"] += places
            rows["origin"] = numbers[rows["origin"]]
            for name, array in {"ids": piece.ids, "mask": piece.mask, "rows": rows, "places": piece.places}.items():
                files[name].write(array.tobytes())
            tokens, places = tokens + len(piece.ids), places + len(piece.places)
            texts += piece.texts[: TEXTS - len(texts)]
        manifest = {
            "key": key,
            "files": {name: file.finish() for name, file in files.items()},
            "sizes": {name: file.size for name, file in files.items()},
            "origins": [asdict(origin) for origin in origins],
            "texts": texts,
        }
    write_synced(place / MANIFEST, json.dumps({**manifest, "sha256": digest_of(manifest)}))
    sync(place)


class _Hashed:
    """A file in the making, with the SHA-256 of what it holds."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self.size = path, hashlib.sha256(), 0

    def __enter__(self) -> _Hashed:
        self._stream = self._path.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        with naming(self._path):
            self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> str:
        """Sync the file to disk and return its SHA-256."""
        with naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return self._digest.hexdigest()
