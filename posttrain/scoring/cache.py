"""Scores kept by content: a system that was asked exactly this before is not asked again.

    <cache>/<key>.jsonl       a header {"key", "sha256"}, then one row per filter and document
    <cache>/<key>.answers     what a system answered to requests, whatever they are scored by (see ``blocks``)

The key covers everything that the scores depend on (see ``score_key``), never a name. The file is trusted when its
header holds the key and the hash of the rows, and the rows answer the documents that are asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.digests import canonical, digest_of
from posttrain.disk import replace_text
from posttrain.scoring.blocks import Blocks
from posttrain.scoring.scorecard import lines_of, row_from_json, row_line

if TYPE_CHECKING:
    from posttrain.gate.spec import DocumentScore

Asked = Mapping[int, tuple[str, str, str]]
"""By document: the hashes of document, requests and target."""


class ScoreCache:
    """A folder of scores by key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str, asked: Asked, filters: Sequence[str]) -> list[DocumentScore] | None:
        """The rows under ``key``; None when there are none. Raises ValueError when they cannot be trusted."""
        try:
            text = self._path(key).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        head, _, body = text.partition("\n")
        header = json.loads(head)
        if not isinstance(header, dict) or header.get("key") != key:
            raise ValueError("it holds other scores")
        if header.get("sha256") != hashlib.sha256(body.encode()).hexdigest():
            raise ValueError("its rows do not match their hash")
        rows = [row_from_json(json.loads(line)) for line in lines_of(body)]
        if _answered(rows) != {name: dict(asked) for name in filters}:
            raise ValueError("it answers other documents")
        return rows

    def write(self, key: str, rows: Sequence[DocumentScore]) -> None:
        """Keep rows under ``key``, without the names that a run gives to system and task."""
        self._folder.mkdir(parents=True, exist_ok=True)
        body = "".join(f"{row_line(replace(row, system='', task=''))}\n" for row in rows)
        header = canonical({"key": key, "sha256": hashlib.sha256(body.encode()).hexdigest()})
        replace_text(self._path(key), f"{header}\n{body}")

    def blocks(self, key: str, size: int) -> Blocks:
        """The answers under ``key``, in blocks of ``size`` documents."""
        return Blocks(self._folder / f"{key}.answers", key, size)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.jsonl"


def score_key(**content: Any) -> str:
    """SHA-256 over JSON values: everything that the scores, or the answers, of one system on one task depend on."""
    return digest_of(content)


def _answered(rows: Sequence[DocumentScore]) -> dict[str, dict[int, tuple[str, str, str]]]:
    answered: dict[str, dict[int, tuple[str, str, str]]] = {}
    for row in rows:
        answered.setdefault(row.filter, {})[row.doc_id] = (row.document_hash, row.request_hash, row.target_hash)
    return answered
