"""Rows that are to be scored and are trained on as well: what they score says nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from posttrain.config.schema import Source
from posttrain.data.files import local_files, rows


def overlap(sources: Sequence[Source], scored: Sequence[str]) -> list[tuple[int, int]]:
    """Of each file in ``scored``, how many rows are rows of the sources too, and how many it has.

    Rows are the same when they hold the same keys and values, null ones left aside. Hub data sets are not looked into.
    """
    if not scored:
        return []
    trained = {digest for source in sources for digest in _digests(source.path, source.limit)}
    digests = [list(_digests(name, None)) for name in scored]
    return [(sum(digest in trained for digest in found), len(found)) for found in digests]


def _digests(name: str, limit: int | None) -> Iterator[bytes]:
    for _, row in islice(chain.from_iterable(rows(path) for path in local_files(name) or ()), limit):
        kept = {key: value for key, value in row.items() if value is not None}
        yield hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).digest()
