"""Scores and answers kept by content: a system is not asked the same twice.

    <cache>/<key>.jsonl       scores: a header {"key", "sha256"}, then one row per filter and document
    <cache>/<key>.answers     answers: a line {"block", "answers", "sha256"} per block, added as soon as it is answered
    <cache>/<key>.N.answers   the same of process N, where several ask

A key covers everything behind the content (see ``score_key``), never a name.

- The key of scores covers the tasks' settings and the hash of every document, request and target. The file is trusted
  when its header holds the key and the hash of the rows, and the rows answer the asked documents.
- The key of answers covers the requests alone, not how they are scored: tasks with equal requests share them, and a
  killed evaluation repeats at most one block. A line is trusted when it holds the hash of its key, block and answers:
  a kill can tear a line, and a torn line is no block.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.digests import canonical, digest_of
from posttrain.disk import append_synced, replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.saved import lines_of, read_text
from posttrain.scoring.scorecard import row_from_json, row_line

if TYPE_CHECKING:
    from posttrain.gate.spec import DocumentScore
    from posttrain.scoring.questions import Asked


class ScoreCache:
    """A folder of scores and answers by key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str, asked: Asked, filters: Sequence[str]) -> list[DocumentScore] | None:
        """Return the rows under ``key``, or None when there are none. Raises ValueError when they cannot be trusted."""
        try:
            text = read_text(self._path(key))
        except FileNotFoundError:
            return None
        except ArtifactDamaged as error:  # scores can be made again: what is damaged is not used, and no reason to stop
            raise ValueError(str(error)) from None
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
        """Keep rows under ``key``, without a run's names of system and task: other runs have other names."""
        self._folder.mkdir(parents=True, exist_ok=True)
        body = "".join(f"{row_line(replace(row, system='', task=''))}\n" for row in rows)
        header = canonical({"key": key, "sha256": hashlib.sha256(body.encode()).hexdigest()})
        replace_text(self._path(key), f"{header}\n{body}")

    def blocks(self, key: str, size: int, rank: int | None = None) -> Blocks:
        """Return the answers under ``key``, in blocks of ``size`` documents; process ``rank`` writes its own file."""
        own = "" if rank is None else f".{rank}"
        return Blocks(self._folder / f"{key}{own}.answers", key, size)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.jsonl"


@dataclass(frozen=True)
class Blocks:
    """The answers of one system to the requests of one task, in files written block by block."""

    path: Path
    """The file to write; all files of the key beside it are read."""
    key: str
    size: int
    """Documents of a block."""

    def read(self) -> dict[int, Sequence[Any]]:
        """Return the answers to each request of each block, by the block's number."""
        found: dict[int, Sequence[Any]] = {}
        stem = self.path.name.partition(".")[0]
        for path in (self.path.with_name(f"{stem}.answers"), *sorted(self.path.parent.glob(f"{stem}.*.answers"))):
            with contextlib.suppress(FileNotFoundError):
                lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
                found |= {block: answers for line in lines for block, answers in self._block(line)}
        return found

    def add(self, block: int, answers: Sequence[Any]) -> None:
        """Append one block and sync it to disk."""
        line = canonical({"block": block, "answers": answers, "sha256": self._hash(block, answers)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The leading newline ends a line torn by a kill; the next reader skips that line, and this one is whole.
        append_synced(self.path, f"\n{line}\n".encode())

    def _block(self, line: str) -> list[tuple[int, Sequence[Any]]]:
        try:
            row = json.loads(line)
            block, answers = row["block"], row["answers"]
            return [(block, answers)] if row["sha256"] == self._hash(block, answers) else []
        except (ValueError, TypeError, KeyError):
            return []

    def _hash(self, block: int, answers: Sequence[Any]) -> str:
        return digest_of([self.key, block, answers])


def score_key(**content: Any) -> str:
    """Return the SHA-256 over JSON values: all that the scores, or the answers, of a system on a task depend on."""
    return digest_of(content)


def _answered(rows: Sequence[DocumentScore]) -> dict[str, dict[int, tuple[str, str, str]]]:
    answered: dict[str, dict[int, tuple[str, str, str]]] = {}
    for row in rows:
        answered.setdefault(row.filter, {})[row.doc_id] = (row.document_hash, row.request_hash, row.target_hash)
    return answered
