"""Every lift ever recorded below one output root: a chain of hashes in SQLite, with a copy of each row in its run.

    <root>/ledger.sqlite                        one row per verdict, task and system that was compared with
    <root>/<run>/stages/<stage>/lifts.jsonl     the rows of this stage, from which the ledger can be rebuilt
    <root>/gates/<gate>-<digest>/lifts.jsonl    the same of what ``posttrain gate`` judged

Rows are only ever added. Each holds the hash of its content and of the row before it, so that a row that was changed,
taken out or moved afterwards is found.
"""

from __future__ import annotations

import getpass
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from posttrain.ledger import history
from posttrain.ledger.chain import Row, linked
from posttrain.ledger.history import GATES
from posttrain.ledger.lift import Judgement, Lift, same_finding
from posttrain.ledger.store import append, last_entry, last_row, path_in, reading, rows_in, writing

__all__ = ["GATES", "Judgement", "Lift", "Row", "check", "lifts", "record"]


def check(root: Path) -> None:
    """Raise before any work is done when the ledger below ``root`` is there and cannot be written to later."""
    if path_in(root).exists():
        with writing(root):
            pass


def record(root: Path, folder: Path, judgement: Judgement) -> None:
    """Add every lift of a verdict, once; ``folder`` is the stage's, or that of a gate about an adapter.

    A verdict that says what the stage's last one said is not added again, and one without a task holds no lift.
    Returns when the rows are on disk. Raises Interrupted when the disk is full or another process holds the ledger for
    too long, ArtifactDamaged when the file is not sound, BadInput when it cannot be opened.
    """
    if not judgement.verdict.tasks:
        return
    with writing(root) as connection:
        former = last_entry(connection, judgement.run, judgement.stage)
        last = last_row(connection)
        entry = judgement.lifts(_after(last), _user())
        known = same_finding(former, entry)
        if not known:
            append(connection, linked(entry, last))
        # Written before the rows are final: after a crash between the two a rebuild still finds them.
        history.keep(folder, former if known else entry)


def lifts(root: Path) -> list[Row]:
    """Every recorded lift, oldest first; none when there is no ledger."""
    if not path_in(root).exists():
        return []
    with reading(root) as connection:
        return rows_in(connection)


def _after(last: Row | None) -> str:
    """The time now, later than that of the last row whatever the clocks of those who write say."""
    now = datetime.now(UTC)
    if last is not None:
        now = max(now, datetime.fromisoformat(last.lift.recorded_at) + timedelta(microseconds=1))
    return now.isoformat(timespec="microseconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number that has no name
        return str(os.getuid())
