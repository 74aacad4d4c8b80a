"""Files at URLs, by fsspec: copied once, whole or not at all, and read from the copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain.data.files import WILDCARDS, format_of, known_endings
from posttrain.digests import digest_of
from posttrain.disk import is_machine_error, lock, replace_text
from posttrain.errors import BadInput, Problem, first_line, reject, suggest

WRAPPERS = (
    "async_wrapper", "asynclocal", "blockcache", "cached", "dask", "data", "dir", "file", "filecache", "generic", "git",
    "jlab", "jupyter", "libarchive", "local", "pyscript", "reference", "root", "simplecache", "tar", "zip",
)  # fmt: skip
"""Schemes of fsspec that read other files, a local disk or another program's: a recipe is data."""
BLOCK = 2**23
"""Bytes of a copy written at once."""


def is_url(name: str) -> bool:
    """Return whether a name is a URL."""
    return "://" in name


def check_url(url: str) -> None:
    """Raise BadInput for a URL whose scheme nothing reads, whose library is missing, or which holds a password."""
    import fsspec

    scheme = urlsplit(url).scheme
    known = sorted(set(fsspec.available_protocols()) - set(WRAPPERS))
    if "::" in url or scheme not in known:
        reject(_shown(url), f"no files are read by {scheme}://", suggest(scheme, known))
    if urlsplit(url).password is not None:
        reject(_shown(url), "holds a password", "Give it by the environment variables of its library")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        reject(_shown(url), f"its library is not installed: {first_line(error)}", "Install it with pip")
    if not any(mark in url for mark in WILDCARDS) and Path(urlsplit(url).path).suffix and not _is_data(url):
        reject(_shown(url), "unknown ending", f"Known: {known_endings()}")


def copy_url(url: str, cache: Path) -> list[tuple[Path, str]]:
    """Return the files behind a URL as copies below ``cache``, each with its URL; a folder or a pattern has several.

    A copy is made again when size, time or tag of the file have changed, resumes where it was interrupted, and serves
    alone where the network is away.

    Raises:
        BadInput: There is no copy, and the files cannot be read.
    """
    check_url(url)
    folder = cache / "urls" / digest_of(url)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as held:
        lock(held)  # another run that copies the same files is waited for
        listing = folder / "names"
        try:
            names = list(_update(url, folder))
            replace_text(listing, "\n".join(names))
        except BadInput:
            raise
        except Exception as error:
            # Every library raises errors of its own; those of this machine are not the network's.
            if is_machine_error(error):
                raise
            if not listing.exists():
                what = f"cannot be read: {first_line(error)}"
                raise BadInput(Problem(where=_shown(url), what=what, fix="Check the name and the network")) from error
            names = listing.read_text(encoding="utf-8").split("\n")
    return [(folder / _local_name(name), _shown(name)) for name in names]


def _update(url: str, folder: Path) -> Iterator[str]:
    """Copy every file that is new or changed; yields their URLs in the order of their names."""
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    if any(mark in path for mark in WILDCARDS):
        found = system.glob(path)
    else:
        found = [path] if _is_data(path) else system.ls(path, detail=False)
    paths = sorted(path for path in found if _is_data(path))
    if not paths:
        reject(_shown(url), f"there is no file of {known_endings()}")
    for each in paths:
        name = str(system.unstrip_protocol(each))
        _copy(system, each, folder / _local_name(name))
        yield name


def _copy(system: Any, path: str, target: Path) -> None:
    info = system.info(path)
    mark = digest_of(sorted(f"{key}={value}" for key, value in info.items()))
    known = target.with_name(f"{target.name}.mark")
    if target.exists() and known.exists() and known.read_text(encoding="utf-8") == mark:
        return
    # The name holds the mark: a part of another version is never gone on with.
    draft = target.with_name(f"{target.name}.{mark[:12]}.part")
    if info.get("size") is None:
        system.get_file(path, str(draft))
    else:
        with draft.open("ab") as copy, system.open(path, "rb") as file:
            file.seek(copy.tell())
            while block := file.read(BLOCK):
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        if draft.stat().st_size != info["size"]:
            draft.unlink()
            raise OSError(f"{path} has changed while it was copied")
    known.unlink(missing_ok=True)
    draft.replace(target)
    replace_text(known, mark)


def _local_name(url: str) -> str:
    """Return the name of a copy: unlike for unlike URLs, with the ending of the file."""
    path = Path(urlsplit(url).path)
    return f"{digest_of(url)[:12]}-{path.name[-80:]}"


def _is_data(name: str) -> bool:
    return format_of(Path(urlsplit(name).path if is_url(name) else name)) is not None


def _shown(url: str) -> str:
    """Return a URL without what may be a secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
