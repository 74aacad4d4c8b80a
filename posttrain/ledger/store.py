"""The ledger in SQLite: one writer at a time, whole transactions, and an exit code for whatever SQLite refuses."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from posttrain.errors import ArtifactDamaged, BadInput, Interrupted, PosttrainError, Problem
from posttrain.ledger.chain import Row
from posttrain.ledger.lift import KINDS, Lift

NAME = "ledger.sqlite"
FORMAT = 1
"""Kept as SQLite's user_version."""
WAIT_SECONDS = 60
"""How long a writer waits for another one."""
TYPES = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL"}
COLUMNS = ("seq", *KINDS, "previous", "hash")
SCHEMA = (
    # AUTOINCREMENT keeps count of all rows ever written, so that rows taken from the end are missed.
    "CREATE TABLE lifts (seq INTEGER PRIMARY KEY AUTOINCREMENT, "
    + "".join(f"{name} {TYPES[kind]} NOT NULL, " for name, kind in KINDS.items())
    + "previous TEXT NOT NULL UNIQUE, hash TEXT NOT NULL)",
    "CREATE INDEX entries ON lifts (run, stage, recorded_at)",
    f"PRAGMA user_version = {FORMAT}",
)


def path_in(root: Path) -> Path:
    """Where the ledger of an output root lies."""
    return root / NAME


@contextlib.contextmanager
def writing(root: Path) -> Iterator[sqlite3.Connection]:
    """One transaction that holds the write lock from its start, so that writers queue and never fail half-way."""
    root.mkdir(parents=True, exist_ok=True)
    with _transaction(path_in(root), "rwc", "BEGIN IMMEDIATE") as connection:
        _prepare(connection, path_in(root))
        yield connection


@contextlib.contextmanager
def reading(root: Path) -> Iterator[sqlite3.Connection]:
    """One transaction on a ledger that is there, which sees one state of it throughout."""
    with _transaction(path_in(root), "rw", "BEGIN") as connection:
        _prepare(connection, path_in(root))
        yield connection


def append(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Add rows at the end."""
    places = ", ".join("?" for _ in COLUMNS)
    statement = f"INSERT INTO lifts ({', '.join(COLUMNS)}) VALUES ({places})"
    for row in rows:
        connection.execute(statement, (row.seq, *asdict(row.lift).values(), row.previous, row.hash))


def records_in(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Every row as SQLite holds it, whatever was done to it."""
    return [_record(row) for row in connection.execute(f"SELECT {', '.join(COLUMNS)} FROM lifts ORDER BY seq")]


def rows_in(connection: sqlite3.Connection) -> list[Row]:
    """Every row; raises ArtifactDamaged when one holds something that is never written."""
    return [_row(record) for record in records_in(connection)]


def last_row(connection: sqlite3.Connection) -> Row | None:
    """The newest row."""
    found = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM lifts ORDER BY seq DESC LIMIT 1").fetchone()
    return _row(_record(found)) if found is not None else None


def last_entry(connection: sqlite3.Connection, run: str, stage: str) -> list[Lift]:
    """The rows of the verdict that was recorded last about a stage of a run."""
    query = f"""SELECT {", ".join(COLUMNS)} FROM lifts WHERE run = :run AND stage = :stage AND recorded_at = (
        SELECT max(recorded_at) FROM lifts WHERE run = :run AND stage = :stage) ORDER BY seq"""
    return [_row(_record(found)).lift for found in connection.execute(query, {"run": run, "stage": stage})]


def rows_ever(connection: sqlite3.Connection) -> int:
    """How many rows were ever written."""
    found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'lifts'").fetchone()
    return int(found[0]) if found is not None else 0


def empty(connection: sqlite3.Connection) -> None:
    """Take every row out, for a rebuild that puts them in again."""
    connection.execute("DELETE FROM lifts")
    connection.execute("DELETE FROM sqlite_sequence")


@contextlib.contextmanager
def _transaction(path: Path, mode: str, begin: str) -> Iterator[sqlite3.Connection]:
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
        if (known := _explained(error, path)) is None:
            raise
        raise known from error


def _explained(error: sqlite3.Error, path: Path) -> PosttrainError | None:
    """The error with the exit code that it has, for those that are not our own fault."""
    # The low byte is the kind; the rest says where in SQLite it arose.
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if kind in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return Interrupted(f"{path} could not be written: {error}. Every row in it is as it was: make room")
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Interrupted(f"{path}: another process has kept it locked for {WAIT_SECONDS:g} seconds")
    if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return ArtifactDamaged(f"{path} is damaged: {error}. posttrain ledger rebuild makes it again from its runs")
    if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        fix = "Give this user the right to write it and its directory"
        return BadInput(Problem(where=str(path), what=f"cannot be opened: {error}", fix=fix))
    return None


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the table in a file that is new or empty; refuse a file of another format."""
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
    # SQLite has no truth values; whatever else was put in their place stays as it is.
    return {key: bool(value) if KINDS.get(key) is bool and value in (0, 1) else value for key, value in record.items()}


def _row(record: dict[str, Any]) -> Row:
    try:
        lift = Lift(**{name: record[name] for name in KINDS})
    except ValueError as error:
        raise ArtifactDamaged(f"row {record['seq']} of the ledger was changed: {error}") from None
    return Row(seq=record["seq"], lift=lift, previous=record["previous"], hash=record["hash"])
