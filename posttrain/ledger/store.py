"""The ledger in SQLite: one writer at a time, whole transactions, and an exit code for each error of SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from posttrain.errors import ArtifactDamaged, BadInput, DiskFailed, Interrupted, PosttrainError, Problem
from posttrain.ledger.chain import Row
from posttrain.ledger.lift import KINDS, Lift
from posttrain.saved import require_file

LEDGER = "ledger.sqlite"
FORMAT = 3
"""Format of the table, kept as SQLite's user_version."""
WAIT_SECONDS = 60
"""Longest wait for another writer."""
REBUILD = "posttrain ledger rebuild makes it again from its runs"
TYPES = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL"}
COLUMNS = ("seq", *KINDS, "previous", "hash")
TRUTH = tuple(name for name, kind in KINDS.items() if kind is bool)
SCHEMA = (
    # AUTOINCREMENT counts all rows ever written: rows removed from the end are missed.
    "CREATE TABLE lifts (seq INTEGER PRIMARY KEY AUTOINCREMENT, "
    + "".join(f"{name} {TYPES[kind]} NOT NULL, " for name, kind in KINDS.items())
    + "previous TEXT NOT NULL UNIQUE, hash TEXT NOT NULL)",
    "CREATE INDEX entries ON lifts (run, stage, recorded_at)",
    f"PRAGMA user_version = {FORMAT}",
)


def ledger_path(root: Path) -> Path:
    """Return the path of an output root's ledger."""
    return root / LEDGER


@contextlib.contextmanager
def writing(root: Path) -> Iterator[sqlite3.Connection]:
    """Open one transaction for writing, in a ledger created when missing."""
    # IMMEDIATE takes the write lock at the start, so that writers queue. Two transactions that read first and
    # lock later would block each other, and SQLite fails one of them at once, without waiting.
    root.mkdir(parents=True, exist_ok=True)
    with _transaction(ledger_path(root), "rwc", "BEGIN IMMEDIATE") as connection:
        _prepare(connection, ledger_path(root))
        yield connection


@contextlib.contextmanager
def reading(root: Path) -> Iterator[sqlite3.Connection]:
    """Open one transaction for reading an existing ledger; it sees one state of it throughout."""
    if ledger_path(root).stat().st_size == 0:
        raise ArtifactDamaged(f"{ledger_path(root)} is empty. {REBUILD}")
    with _transaction(ledger_path(root), "rw", "BEGIN") as connection:
        _prepare(connection, ledger_path(root))
        yield connection


def append(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Add rows at the end."""
    places = ", ".join("?" for _ in COLUMNS)
    statement = f"INSERT INTO lifts ({', '.join(COLUMNS)}) VALUES ({places})"
    for row in rows:
        connection.execute(statement, (row.seq, *asdict(row.lift).values(), row.previous, row.hash))


def raw_rows(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Return every row as SQLite holds it, changed or not."""
    return [_record(row) for row in connection.execute(f"SELECT {', '.join(COLUMNS)} FROM lifts ORDER BY seq")]


def rows_of(records: Iterable[dict[str, Any]]) -> list[Row]:
    """Return the rows in ``raw_rows``; raise ArtifactDamaged when a value has a type that is never written."""
    return [_row(record) for record in records]


def last_row(connection: sqlite3.Connection) -> Row | None:
    """Return the newest row, None in an empty ledger."""
    found = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM lifts ORDER BY seq DESC LIMIT 1").fetchone()
    return _row(_record(found)) if found is not None else None


def last_finding(connection: sqlite3.Connection, run: str, stage: str) -> list[Lift]:
    """Return the lifts recorded last about a stage of a run."""
    query = f"""SELECT {", ".join(COLUMNS)} FROM lifts WHERE run = :run AND stage = :stage AND recorded_at = (
        SELECT max(recorded_at) FROM lifts WHERE run = :run AND stage = :stage) ORDER BY seq"""
    return [_row(_record(found)).lift for found in connection.execute(query, {"run": run, "stage": stage})]


def rows_ever(connection: sqlite3.Connection) -> int:
    """Return the number of rows ever written."""
    found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'lifts'").fetchone()
    return int(found[0]) if found is not None else 0


def clear(connection: sqlite3.Connection) -> None:
    """Remove every row, and the count of them, for a rebuild."""
    connection.execute("DELETE FROM lifts")
    connection.execute("DELETE FROM sqlite_sequence")


@contextlib.contextmanager
def _transaction(path: Path, mode: str, begin: str) -> Iterator[sqlite3.Connection]:
    # A URI because its mode keeps a reader from creating an empty ledger. Without an isolation level Python begins no
    # transaction of its own, so that BEGIN and COMMIT stand here and nowhere else.
    require_file(path)  # SQLite would wait for a pipe for ever
    address = f"file:{quote(str(path.absolute()))}?mode={mode}"
    try:
        connection = sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS, isolation_level=None)
        with contextlib.closing(connection):
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
    except sqlite3.Error as error:
        if (known := _explain(error, path)) is None:
            raise
        raise known from error


def _explain(error: sqlite3.Error, path: Path) -> PosttrainError | None:
    """Return the error as one with an exit code; None for an error of our own making."""
    # The low byte is the kind of the error, the rest its place in SQLite.
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if kind in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        fix = "No recorded row is lost: make room and run the same command again"
        return DiskFailed(Problem(where=str(path), what=f"could not be written: {error}", fix=fix))
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Interrupted(f"{path}: another process has kept it locked for {WAIT_SECONDS:g} seconds")
    if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return ArtifactDamaged(f"{path} is damaged: {error}. {REBUILD}")
    if kind == sqlite3.SQLITE_ERROR:  # no such table or column: the statements here are right for a ledger
        return ArtifactDamaged(f"{path} is no ledger: {error}. Move it away; {REBUILD}")
    if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        fix = "Give this user the right to write it and its directory"
        return BadInput(Problem(where=str(path), what=f"cannot be opened: {error}", fix=fix))
    return None


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Create the table in a new or empty file; reject a file of another format."""
    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        for statement in SCHEMA:
            connection.execute(statement)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != FORMAT:
        what = f"is no ledger that this version reads: its format is {version}, not {FORMAT}"
        fix = "Move it away; posttrain ledger rebuild makes one from the runs"
        raise BadInput(Problem(where=str(path), what=what, fix=fix))


def _record(values: Iterable[Any]) -> dict[str, Any]:
    record = dict(zip(COLUMNS, values, strict=True))
    # SQLite has no truth values. Another number in their place stays as it is, for the audit to find.
    for key in TRUTH:
        if record[key] in (0, 1):
            record[key] = bool(record[key])
    return record


def _row(record: dict[str, Any]) -> Row:
    content = {**record}
    del content["seq"], content["previous"], content["hash"]
    try:
        lift = Lift(**content)
    except ValueError as error:
        raise ArtifactDamaged(f"row {record['seq']} of the ledger was changed: {error}") from None
    return Row(seq=record["seq"], lift=lift, previous=record["previous"], hash=record["hash"])
