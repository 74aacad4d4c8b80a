"""Digests: SHA-256 of JSON values and files, equal for equal content."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
SURROGATES = re.compile("[\ud800-\udfff]")


def canonical(value: Any) -> str:
    """Return ``value`` as JSON with sorted keys and no spaces: equal values give equal texts.

    Half of a surrogate pair, which no encoding holds, is written as its escape.
    """
    text = ENCODER.encode(value)
    return text if text.isascii() else SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_digests(paths: Mapping[str, Path], digest: Callable[[Path], str] = file_digest) -> dict[str, str]:
    """Return the SHA-256 of several files by name, hashing them in parallel; ``digest`` may know some already."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(digest, paths.values()), strict=True))
