"""Releases: the names under which artifacts are served, each move of a name a row of the ledger.

    <root>/ledger.sqlite     the rows, chained by their hashes; each holds the hash of the last lift before it as well
    <root>/aliases.json      the same rows, replaced whole: what running servers read, and a rebuild

A promotion adds an artifact to the history of its name, a rollback takes the last one off again: both are rows, and no
row is ever changed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from posttrain.digests import canonical
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged, reject
from posttrain.ledger.chain import START, Row, hash_of
from posttrain.ledger.store import last_row, writing
from posttrain.saved import as_kind, parse_json, read_json

ALIASES = "aliases.json"
LATEST = "latest"
TABLE = (
    "CREATE TABLE IF NOT EXISTS releases (seq INTEGER PRIMARY KEY AUTOINCREMENT, content TEXT NOT NULL, "
    "previous TEXT NOT NULL UNIQUE, hash TEXT NOT NULL)"
)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One move of a name."""

    recorded_at: str
    """UTC with microseconds."""
    recorded_by: str
    action: Literal["promote", "rollback"]
    alias: str
    artifact: str
    """Digest behind the name from now on; empty when the name has none of its own any more."""
    replaced: str
    """Digest behind the name before; empty when there was none."""
    path: str
    """Folder of the artifact, relative to the output root."""
    unpromoted: str
    """Reason for which no gate stands behind the artifact; empty when one does."""
    lifts: str
    """Hash of the last lift recorded before; empty before the first."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A release in its place in the chain."""

    seq: int
    release: Release
    previous: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The artifact behind a name, and where it lies."""

    artifact: str
    path: str


def add(root: Path, alias: str, standing: Standing | None, unpromoted: str, when: str, who: str) -> Release:
    """Record a promotion of ``alias`` to an artifact, or its rollback when ``standing`` is None; return the row.

    Raises BadInput for a rollback of a name that has nothing before it.
    """
    if standing is None and not (root / ALIASES).exists():
        _before(alias, [])
    with writing(root) as connection:
        connection.execute(TABLE)
        links = _stored(connection)
        check(links, str(root / ALIASES))
        history = histories(links).get(alias, [])
        last = last_row(connection)
        release = Release(
            recorded_at=max([when, *(link.release.recorded_at for link in links[-1:])]),
            recorded_by=who, action="rollback" if standing is None else "promote", alias=alias,
            artifact="", replaced=history[-1].artifact if history else "", path="", unpromoted=unpromoted,
            lifts=last.hash if last is not None else "",
        )  # fmt: skip
        target = standing if standing is not None else _before(alias, history)
        if target is not None:
            release = replace(release, artifact=target.artifact, path=target.path)
        links = [*links, *_linked([release], links[-1] if links else None)]
        # In this order, as with lifts: a crash between the two leaves a row in the copy, which a rebuild adds.
        _write(root, links)
        _store(connection, links[-1:])
    return release


def read(root: Path) -> list[Link]:
    """Return every release in ``aliases.json``, oldest first; none when there is no such file.

    Raises ArtifactDamaged naming a row that was changed.
    """
    path = root / ALIASES
    try:
        found = read_json(path)
    except FileNotFoundError:
        return []
    rows = as_kind(dict, found, str(path)).get("rows")
    links = [_link(row, str(path)) for row in as_kind(list, rows, str(path))]
    check(links, str(path))
    return links


def histories(links: Iterable[Link]) -> dict[str, list[Standing]]:
    """Return the artifacts of each name, the present one last; a name without any has none."""
    found: dict[str, list[Standing]] = {}
    for link in links:
        release, line = link.release, found.setdefault(link.release.alias, [])
        if release.action == "promote":
            line.append(Standing(artifact=release.artifact, path=release.path))
        elif line:
            line.pop()
    return {alias: line for alias, line in found.items() if line}


def faults(connection: sqlite3.Connection, root: Path, lifts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each change made to written releases, and each difference between the ledger and its copy."""
    known = {str(record["hash"]) for record in lifts} | {""}
    try:
        stored, copied = _stored(connection), read(root)
        check(stored, "the ledger")
    except ArtifactDamaged as error:
        yield str(error)
        return
    if stored != copied:
        yield f"the {len(stored)} releases are not the {len(copied)} in {root / ALIASES} (posttrain ledger rebuild)"
    for link in stored:
        if link.release.lifts not in known:
            yield f"release {link.seq} ({link.release.alias}) follows a lift that is not in the ledger"


def rebuild(connection: sqlite3.Connection, root: Path, rows: Sequence[Row]) -> None:
    """Store the releases of ``aliases.json`` again, each after the last lift recorded before it."""
    links = read(root)
    if not links:
        return
    connection.execute(TABLE)
    connection.execute("DELETE FROM releases")
    connection.execute("DELETE FROM sqlite_sequence WHERE name = 'releases'")
    moved = []
    for link in links:
        before = [row.hash for row in rows if row.lift.recorded_at <= link.release.recorded_at]
        moved.append(replace(link.release, lifts=before[-1] if before else ""))
    relinked = list(_linked(moved, None))
    _store(connection, relinked)
    _write(root, relinked)


def check(links: Sequence[Link], where: str) -> None:
    """Raise ArtifactDamaged naming the first release that does not have its hash, or its place in the chain."""
    seq, previous = 0, START
    for link in links:
        sound = link.hash == hash_of(asdict(link.release), link.previous)
        if not sound or (link.seq, link.previous) != (seq + 1, previous):
            raise ArtifactDamaged(
                f"{where}: release {link.seq} ({link.release.alias}) was changed after it was written"
            )
        seq, previous = link.seq, link.hash


def _before(alias: str, history: Sequence[Standing]) -> Standing | None:
    if len(history) > 1:
        return history[-2]
    if not (history and alias == LATEST):
        what = "names one artifact, with none before it" if history else "was never promoted"
        reject(f"rollback {alias}", what, f"posttrain promote {alias} DIGEST names another one")
    return None  # the last by lineage, as before the first promotion


def _linked(releases: Iterable[Release], last: Link | None) -> Iterator[Link]:
    seq, previous = (last.seq, last.hash) if last is not None else (0, START)
    for release in releases:
        seq += 1
        link = Link(seq=seq, release=release, previous=previous, hash=hash_of(asdict(release), previous))
        yield link
        previous = link.hash


def _stored(connection: sqlite3.Connection) -> list[Link]:
    if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'releases'").fetchone()[0]:
        return []
    found = connection.execute("SELECT seq, content, previous, hash FROM releases ORDER BY seq")
    return [
        _link({"seq": seq, **parse_json(content, f"release {seq}"), "previous": previous, "hash": own}, "the ledger")
        for seq, content, previous, own in found
    ]


def _store(connection: sqlite3.Connection, links: Iterable[Link]) -> None:
    for link in links:
        values = (link.seq, canonical(asdict(link.release)), link.previous, link.hash)
        connection.execute("INSERT INTO releases (seq, content, previous, hash) VALUES (?, ?, ?, ?)", values)


def _write(root: Path, links: Sequence[Link]) -> None:
    rows = [{"seq": link.seq, **asdict(link.release), "previous": link.previous, "hash": link.hash} for link in links]
    replace_text(root / ALIASES, json.dumps({"rows": rows}, indent=1) + "\n")


def _link(row: Any, where: str) -> Link:
    values = dict(as_kind(dict, row, where))
    place = {name: values.pop(name, None) for name in ("seq", "previous", "hash")}
    return as_kind(Link, {**place, "release": values}, where)
