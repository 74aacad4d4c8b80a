"""Two halves of a gate's documents: one chooses among several candidates, the other judges the chosen one, once.

The best of many candidates looks better than it is on the documents that chose it: of twenty that changed nothing, the
luckiest passes far more often than the gate promises. On documents that chose nothing it errs as often as any other.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import Enum
from hashlib import sha256

SALT = b"posttrain.gate.halves/1/"
"""Part of every draw: no other use of a document's hash divides the documents in the same way."""


class Half(Enum):
    """The use of one half of a gate's documents."""

    choosing = "choosing"
    judging = "judging"


def half_of(document_hash: str) -> Half:
    """Return the half of a document, which follows from its content alone: in every task, run and order the same."""
    return Half.choosing if sha256(SALT + document_hash.encode()).digest()[0] % 2 else Half.judging


def select_half(hashes: Mapping[int, str], half: Half, clusters: Mapping[int, Hashable] | None = None) -> set[int]:
    """Return the documents of one half; those that share a source are on the side of the least of their hashes.

    Args:
        hashes: Hash of every document.
        half: The wanted half.
        clusters: Source of every document, where documents share sources.
    """
    least: dict[Hashable, str] = {}
    for document, found in hashes.items():
        source = _source(document, clusters)
        least[source] = min(found, least.get(source, found))
    return {document for document in hashes if half_of(least[_source(document, clusters)]) is half}


def _source(document: int, clusters: Mapping[int, Hashable] | None) -> Hashable:
    return document if clusters is None else clusters[document]
