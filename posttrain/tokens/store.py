"""Store of rendered rows: for each key a folder of flat files, filled once, checked and mapped by every reader.

    <cache>/tokens/<key>/             ids.bin  mask.bin  rows.bin  places.bin   the arrays of a TokenTable
                         manifest.json  the key, counts, the size and the SHA-256 of every file; written last
    <cache>/tokens/<key>.filling/     pieces of a fill at work, or of a killed one: the next takes them over
    <cache>/tokens/digests.json       of the files, with their times: an unchanged file is hashed once
    <cache>/tokens/<key>.lock         held by the process that fills it; others wait for it, and map its work

The key covers all that rows depend on: records, tokenizer, template and its variables, settings, code. So a store
never changes and a hit is exact. A store that does not match its manifest is named, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import posttrain
from posttrain.data.contents import Contents
from posttrain.data.records import Origin
from posttrain.digests import digest_of, file_digests
from posttrain.disk import lock
from posttrain.errors import ArtifactDamaged, Interrupted
from posttrain.saved import as_kind, read_json
from posttrain.tokens.filling import ARRAYS, MANIFEST, Fill, fill_store
from posttrain.tokens.table import TokenTable

FORMAT = 1
"""Number of the layout of the files, part of every key."""
CODE = ("tokens", "data", "sft", "chat_template.py", "model/loading.py")
"""Files of posttrain that decide how a record is rendered."""
DIGESTS = "digests.json"
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a complete store."""

    key: str
    files: dict[str, str]
    """SHA-256 of each file."""
    sizes: dict[str, int]
    """Bytes of each file."""
    origins: list[Origin]
    texts: list[str]


def store_key(records: str, tokenizer: Any, **settings: Any) -> str:
    """Return the digest of everything behind the rows of a store.

    Args:
        records: Digest of the records.
        tokenizer: The tokenizer with its chat template.
        settings: Other inputs of rendering as JSON values, such as the variables of the template.
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
    place, note = folder / key, cache(fill.note)  # a damage that both looks find is named once
    if (table := _open(place, key, note)) is not None:
        return table
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{key}.lock", fill):
        if (table := _open(place, key, note)) is None:  # another process may have filled it by now
            shutil.rmtree(place, ignore_errors=True)
            fill_store(folder / f"{key}.filling", place, key, fill)
            table = _open(place, key, note)
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
        contents = Contents(place.parent / DIGESTS)
        _verify(place, manifest, contents)
        contents.save()
        arrays = {name: _mapped(place / f"{name}.bin", kind) for name, kind in ARRAYS.items()}
    except (ArtifactDamaged, FileNotFoundError) as error:
        why = f"{place} is incomplete: {error}" if isinstance(error, FileNotFoundError) else str(error)
        note(f"warning: damaged token store, made again: {why}")
        return None
    with contextlib.suppress(OSError):  # a store of others, or on a disk that is read only
        os.utime(place)  # its age is the time since its last use
    sums = manifest.files["ids"], manifest.files["mask"]
    return TokenTable(**arrays, origins=tuple(manifest.origins), texts=tuple(manifest.texts), sums=sums)


def _read_manifest(path: Path) -> Manifest:
    """Return a manifest. Raises ArtifactDamaged when it is not as it was written."""
    value = read_json(path)
    if not isinstance(value, dict) or value.pop("sha256", None) != digest_of(value):
        raise ArtifactDamaged(f"{path} does not match its SHA-256")
    return as_kind(Manifest, value, str(path))


def _verify(place: Path, manifest: Manifest, contents: Contents) -> None:
    """Raise ArtifactDamaged naming a file that is not the one of the manifest."""
    paths = {name: place / f"{name}.bin" for name in ARRAYS}
    for name, path in paths.items():
        if (found := path.stat().st_size) != manifest.sizes.get(name):
            raise ArtifactDamaged(f"{path} has {found:,} bytes, not {manifest.sizes.get(name, 0):,}")
    for name, digest in file_digests(paths, contents.digest).items():
        if digest != manifest.files.get(name):
            raise ArtifactDamaged(f"{paths[name]} does not match its SHA-256")


def _mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """Return the array in a file, read from the disk as it is used."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, kind)
    return np.asarray(np.memmap(path, kind, mode="r"))


@contextlib.contextmanager
def _locked(path: Path, fill: Fill) -> Iterator[None]:
    """Hold the lock at ``path``; waits for another holder, whose end or death frees it."""
    with contextlib.closing(_acquire(path, fill)):
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # of Windows, which removes no open file
                path.unlink(missing_ok=True)


def _acquire(path: Path, fill: Fill) -> IO[bytes]:
    told = False
    while True:
        stream = path.open("ab")
        if not lock(stream, wait=False):
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
