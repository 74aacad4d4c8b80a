"""Every lift ever recorded below one output root, in SQLite."""

from __future__ import annotations

import contextlib
import getpass
import sqlite3
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.artifact import Artifact
    from posttrain.gate.spec import Verdict

NAME = "ledger.sqlite"
WAIT_SECONDS = 60
"""How long a writer waits for another one."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS lifts (
    artifact TEXT NOT NULL,      -- digest of the judged artifact
    parent TEXT NOT NULL,        -- digest of what it was trained from
    base TEXT NOT NULL,          -- digest of the base weights
    run TEXT NOT NULL,           -- name of the run's directory
    recipe TEXT NOT NULL,
    stage TEXT NOT NULL,
    task TEXT NOT NULL,
    metric TEXT NOT NULL,
    role TEXT NOT NULL,
    against TEXT NOT NULL,
    n INTEGER NOT NULL,
    base_score REAL NOT NULL,
    parent_score REAL NOT NULL,
    candidate_score REAL NOT NULL,
    lift REAL NOT NULL,
    low REAL NOT NULL,
    high REAL NOT NULL,
    state TEXT NOT NULL,         -- pass, fail or undecided, of this task
    verdict TEXT NOT NULL,       -- the same, of the whole gate
    recorded_by TEXT NOT NULL,
    recorded_at TEXT NOT NULL,
    PRIMARY KEY (run, stage, artifact, task, metric, against)
)
"""


def record(root: Path, run: str, recipe: str, stage: str, artifact: Artifact, verdict: Verdict) -> None:
    """Add every lift of a verdict; a verdict about the same artifact in the same run replaces the one before."""
    manifest = artifact.manifest
    shared = {
        "artifact": artifact.digest, "parent": manifest["parent_digest"], "base": manifest["base"]["digest"],
        "run": run, "recipe": recipe, "stage": stage, "verdict": verdict.state,
        "recorded_by": getpass.getuser(), "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    rows = [
        shared | {
            "task": t.task, "metric": t.metric, "role": t.role, "against": t.against, "n": t.n,
            "base_score": t.base, "parent_score": t.parent, "candidate_score": t.candidate,
            "lift": t.lift, "low": t.low, "high": t.high, "state": t.state,
        }
        for t in verdict.tasks
    ]  # fmt: skip
    with _connected(root) as connection:
        for row in rows:
            columns = ", ".join(row)
            values = ", ".join(f":{name}" for name in row)
            connection.execute(f"INSERT OR REPLACE INTO lifts ({columns}) VALUES ({values})", row)


def lifts(root: Path) -> list[Mapping[str, Any]]:
    """Every recorded lift, oldest first."""
    with _connected(root) as connection:
        return [dict(row) for row in connection.execute("SELECT * FROM lifts ORDER BY recorded_at, rowid")]


@contextlib.contextmanager
def _connected(root: Path) -> Iterator[sqlite3.Connection]:
    """One transaction that holds the write lock from its start, so that writers queue and never fail half-way."""
    root.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(root / NAME, timeout=WAIT_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(SCHEMA)
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    finally:
        connection.close()
