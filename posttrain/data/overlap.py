"""Rows of gate files that are also in the training data: their scores show memory, not skill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from posttrain.config.schema import Source
from posttrain.data.files import local_files
from posttrain.data.reading import select_rows


def count_overlap(sources: Sequence[Source], scored: Sequence[str]) -> list[tuple[int, int]]:
    """Count, for each file in ``scored``, the rows also selected by the sources, and all rows.

    Two rows are the same when they hold the same keys and values in their files, null ones ignored. Hub datasets are
    not searched.
    """
    if not scored:
        return []
    trained = {digest for source in sources for digest in _digests(source)}
    digests = [list(_digests(Source(path=name))) for name in scored]
    return [(sum(digest in trained for digest in found), len(found)) for found in digests]


def _digests(source: Source) -> Iterator[bytes]:
    if local_files(source.path) is None:
        return
    for _, row in select_rows(source):
        kept = {key: value for key, value in row.items() if value is not None}
        yield hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).digest()
