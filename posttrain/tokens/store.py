"""The store of rendered rows: a folder of flat files for each key, filled once, checked and mapped ever after.

    <cache>/tokens/<key>/             ids.bin  mask.bin  rows.bin  places.bin   the arrays of a TokenTable
                         manifest.json  the key, counts, the size and the SHA-256 of every file; written last
    <cache>/tokens/<key>.filling/     pieces of a fill that goes on, or was killed: the next one takes them over
    <cache>/tokens/<key>.lock         held by the process that fills it; others wait for it, and map its work

The key covers all that rows depend on: records, tokenizer, template and its variables, settings, code. So a store
never changes and a hit is exact. A store that does not match its manifest is named, and made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import posttrain
from posttrain.data.records import Origin
from posttrain.digests import digest_of, file_digests
from posttrain.disk import naming, sync, write_synced
from posttrain.errors import ArtifactDamaged, Interrupted
from posttrain.saved import as_kind, read_json
from posttrain.tokens.table import ROW, TEXTS, TableRow, TokenTable

FORMAT = 1
"""Number of the layout of the files, part of every key."""
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
CODE = ("tokens", "data", "sft", "chat_template.py", "model/loading.py")
"""Files of posttrain that decide how a record is rendered."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete store holds."""

    key: str
    files: dict[str, str]
    """SHA-256 of each file."""
    sizes: dict[str, int]
    """Bytes of each file."""
    origins: list[Origin]
    texts: list[str]


@dataclass(frozen=True, kw_only=True)
class Fill:
    """The work behind a store: how records become rows, and whom to tell."""

    records: Sequence[Any]
    rows: Callable[[Any], list[TableRow]]
    """Renders one record; raises BadInput for a bad one."""
    note: Callable[[str], None] = lambda text: None
    """Gets a line for the user."""
    part: Callable[[int, int, str], None] = lambda done, total, what: None
    """Gets the number of records done and their total, after each piece."""
    stop_requested: Callable[[], bool] = lambda: False


def store_key(records: str, tokenizer: Any, **settings: Any) -> str:
    """Return the key of a store: a digest of all that its rows depend on.

    Args:
        records: Digest of the records.
        tokenizer: The tokenizer with its chat template.
        settings: JSON values: the variables of the template, and all else that rendering is told.
    """
    return digest_of(
        {
            "format": FORMAT,
            "records": records,
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "class": type(tokenizer).__name__,
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "template": tokenizer.get_chat_template(),
            "settings": settings,
            "code": _code_digest(),
        }
    )


def stored_table(folder: Path, key: str, fill: Fill) -> TokenTable:
    """Return the table under ``key`` in ``folder``, mapped; fill it first when there is none or it is damaged.

    Raises:
        BadInput: A record cannot be rendered.
        Interrupted: A stop was requested; what is rendered by then is kept.
    """
    place = folder / key
    if (table := _open(place, key, fill.note)) is not None:
        return table
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{key}.lock", fill):
        if (table := _open(place, key, fill.note)) is None:  # another process may have filled it by now
            shutil.rmtree(place, ignore_errors=True)
            _fill(folder / f"{key}.filling", place, key, fill)
            table = _open(place, key, fill.note)
    if table is None:
        raise ArtifactDamaged(f"{place} does not hold what was written to it: the disk is at fault")
    return table


def _open(place: Path, key: str, note: Callable[[str], None]) -> TokenTable | None:
    """Return the table at ``place``; None when there is none, or a damaged one, which is named."""
    if not place.is_dir():
        return None
    try:
        manifest = _read_manifest(place / MANIFEST)
        if manifest.key != key:
            raise ArtifactDamaged(f"{place} holds the rows of another key")
        _verify(place, manifest)
        arrays = {name: _mapped(place / f"{name}.bin", kind) for name, kind in ARRAYS.items()}
    except (ArtifactDamaged, FileNotFoundError) as error:
        why = f"{place} is incomplete: {error}" if isinstance(error, FileNotFoundError) else str(error)
        note(f"warning: damaged token store, made again: {why}")
        return None
    return TokenTable(**arrays, origins=tuple(manifest.origins), texts=tuple(manifest.texts))


def _read_manifest(path: Path) -> Manifest:
    """Return a manifest. Raises ArtifactDamaged when it is not as it was written."""
    value = read_json(path)
    if not isinstance(value, dict) or value.pop("sha256", None) != digest_of(value):
        raise ArtifactDamaged(f"{path} does not match its SHA-256")
    return as_kind(Manifest, value, str(path))


def _verify(place: Path, manifest: Manifest) -> None:
    """Raise ArtifactDamaged naming a file that is not the one of the manifest."""
    paths = {name: place / f"{name}.bin" for name in ARRAYS}
    for name, path in paths.items():
        if (found := path.stat().st_size) != manifest.sizes.get(name):
            raise ArtifactDamaged(f"{path} has {found:,} bytes, not {manifest.sizes.get(name, 0):,}")
    for name, digest in file_digests(paths).items():
        if digest != manifest.files.get(name):
            raise ArtifactDamaged(f"{paths[name]} does not match its SHA-256")


def _mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """Return the array in a file, read from the disk as it is used."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, kind)
    return np.asarray(np.memmap(path, kind, mode="r"))


# --- Filling ----------------------------------------------------------------------------------------------------------


def _fill(pieces: Path, place: Path, key: str, fill: Fill) -> None:
    """Render all records piece by piece, and join the pieces at ``place``."""
    pieces.mkdir(parents=True, exist_ok=True)
    total = len(fill.records)
    numbers = range(-(-total // PIECE))
    for number in numbers:
        if fill.stop_requested():
            raise Interrupted("stopped while records were rendered; run the same command again, and it goes on there")
        path = pieces / f"{number}.piece"
        if _piece_of(path) is None:
            made = (row for record in fill.records[number * PIECE : (number + 1) * PIECE] for row in fill.rows(record))
            _write_piece(path, TokenTable.of(made))
        fill.part(min((number + 1) * PIECE, total), total, "record")
    joined = pieces / "joined"
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    _join([pieces / f"{number}.piece" for number in numbers], joined, key)
    joined.replace(place)
    sync(place.parent)
    shutil.rmtree(pieces)


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
    arrays = {
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


@contextlib.contextmanager
def _locked(path: Path, fill: Fill) -> Iterator[None]:
    """Hold the lock at ``path``; waits for another holder, whose end or death frees it."""
    with contextlib.closing(_acquire(path, fill)):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _acquire(path: Path, fill: Fill) -> IO[bytes]:
    told = False
    while True:
        stream = path.open("ab")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            if fill.stop_requested():
                raise Interrupted("stopped while another process renders the same records") from None
            if not told:
                fill.note("waits for another process that renders the same records")
                told = True
            fill.part(0, len(fill.records), "record")
            time.sleep(POLL_SECONDS)
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(stream.fileno()).st_ino:
                return stream
        stream.close()  # its holder removed the file between our opening and our locking it


@cache
def _code_digest() -> str:
    """Return the digest of CODE and of the libraries that render."""
    import jinja2
    import tokenizers
    import transformers

    root = Path(posttrain.__file__).parent
    files = [path for name in CODE for path in (sorted((root / name).glob("*.py")) or [root / name])]
    digests = file_digests({str(path.relative_to(root)): path for path in files})
    return digest_of([digests, [module.__version__ for module in (jinja2, tokenizers, transformers)]])
