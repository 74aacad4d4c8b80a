"""Finished preparations in a cache by content: the ledger, its counts, and the digest that shows damage.

cache/data/<key>/ledger.parquet
cache/data/<key>/summary.json    written last
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.digests import digest_of, file_digest
from posttrain.disk import sync, write_synced
from posttrain.errors import ArtifactDamaged
from posttrain.prepare.ledger import KEPT, Ledger, Summary
from posttrain.saved import as_kind, plain, read_json

LEDGER, SUMMARY = "ledger.parquet", "summary.json"
LAYOUT = 6
"""Version of these files and of the flow; part of every key."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Content of ``summary.json``."""

    layout: int
    key: str
    ledger: str
    """SHA-256 of the ledger."""
    kept: str
    """Digest of the positions of the rows that stay."""
    rows: int
    """Rows of ``data``."""
    summary: Summary


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A finished preparation."""

    folder: Path
    entry: Entry

    @property
    def summary(self) -> Summary:
        """Counts of rows."""
        return self.entry.summary

    @property
    def ledger(self) -> Path:
        """Parquet file with one row for every row read."""
        return self.folder / LEDGER

    def rows(self) -> array[int]:
        """Return the positions of the rows of ``data`` that stay. Raises ArtifactDamaged for a changed ledger."""
        return array("q", (at for at, (action,) in enumerate(self._values("action")) if action == KEPT))

    def clusters(self) -> Mapping[str, int]:
        """Return the number of the cluster of every row of ``data`` that is like others, by its place as ``file:line``.

        Raises ArtifactDamaged for a changed ledger.
        """
        return {where: cluster for where, cluster in self._values("where", "cluster") if cluster is not None}

    def _values(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield the values of these columns for each row of ``data``."""
        from pyarrow.parquet import ParquetFile

        if file_digest(self.ledger) != self.entry.ledger:
            raise ArtifactDamaged(f"{self.ledger} is damaged: its SHA-256 is not the one in {SUMMARY}")
        with ParquetFile(self.ledger) as table:
            batches = table.iter_batches(columns=list(names))
            columns = ([each.column(name).to_pylist() for name in names] for each in batches)
            yield from islice((row for each in columns for row in zip(*each, strict=True)), self.entry.rows)


def find(root: Path, key: str, note: Callable[[str], None]) -> Kept | None:
    """Return the preparation of a key; None for none, or for a damaged one, which ``note`` receives."""
    folder = root / key
    try:
        entry = as_kind(Entry, read_json(folder / SUMMARY), str(folder / SUMMARY))
        if entry.layout != LAYOUT or entry.key != key:
            raise ArtifactDamaged(f"{folder / SUMMARY} is of another preparation")
        if file_digest(folder / LEDGER) != entry.ledger:
            raise ArtifactDamaged(f"{folder / LEDGER} is damaged: its SHA-256 is not the one in {SUMMARY}")
    except FileNotFoundError:
        return None
    except ArtifactDamaged as error:
        note(f"prepared again: {error}")
        return None
    return Kept(folder=folder, entry=entry)


def keep(root: Path, key: str, ledger: Ledger, tasks: Mapping[str, int]) -> Kept:
    """Write a preparation under its key in one step, in place of a damaged one."""
    draft = root / f".{key}.{secrets.token_hex(4)}.tmp"
    draft.mkdir(parents=True)
    try:
        ledger.write(draft / LEDGER, {"posttrain.key": key, "posttrain.layout": str(LAYOUT)})
        sync(draft / LEDGER)
        entry = Entry(
            layout=LAYOUT, key=key, ledger=file_digest(draft / LEDGER), kept=kept_digest(ledger),
            rows=ledger.trained, summary=ledger.summary(tasks),
        )  # fmt: skip
        write_synced(draft / SUMMARY, json.dumps(plain(entry)))
        _put(draft, root / key)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Kept(folder=root / key, entry=entry)


def kept_digest(ledger: Ledger) -> str:
    """Return the digest of the rows that stay; empty when all of them do."""
    kept = ledger.kept()
    return "" if len(kept) == ledger.trained else digest_of(kept)


def _put(draft: Path, folder: Path) -> None:
    # Another process may put the same preparation there at the same time: either is right.
    try:
        os.rename(draft, folder)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(draft, folder)
    sync(folder.parent)


def settings_key(content: Any) -> str:
    """Return the key of a preparation from everything that it depends on."""
    return digest_of([LAYOUT, content])[:32]
