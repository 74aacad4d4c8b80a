"""What a system answered, kept block by block: a killed evaluation asks at most one block again.

    <cache>/<key>.answers     a line {"block", "answers", "sha256"} per block, added as soon as it is answered

The key covers everything that the answers depend on, and nothing of how they are scored: tasks that put the same
requests share them. A line is trusted when it holds the hash of its block, its answers and the key, so that one that a
kill tore is no block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.digests import canonical, digest_of


@dataclass(frozen=True)
class Blocks:
    """The blocks of requests that one system answers."""

    path: Path
    key: str
    size: int
    """Documents of a block."""

    def read(self) -> dict[int, Sequence[Any]]:
        """By number of the block: for each of its requests, its answers."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return {}
        return {block: answers for line in lines for block, answers in self._block(line)}

    def add(self, block: int, answers: Sequence[Any]) -> None:
        """Keep one block; it is on disk when this returns."""
        line = canonical({"block": block, "answers": answers, "sha256": self._hash(block, answers)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            # what a kill tore has no end of line
            stream.write(f"\n{line}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())

    def _block(self, line: str) -> list[tuple[int, Sequence[Any]]]:
        try:
            row = json.loads(line)
            block, answers = row["block"], row["answers"]
            return [(block, answers)] if row["sha256"] == self._hash(block, answers) else []
        except (ValueError, TypeError, KeyError):
            return []

    def _hash(self, block: int, answers: Sequence[Any]) -> str:
        return digest_of([self.key, block, answers])
