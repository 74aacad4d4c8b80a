"""The ledger: every lift ever recorded below one output root, in SQLite, with a copy of each row in its run.

    <root>/ledger.sqlite                        one row per verdict, task and system compared with
    <root>/<run>/stages/<stage>/lifts.jsonl     the rows of this stage
    <root>/gates/<gate>-<digest>/lifts.jsonl    the rows of one adapter judged by ``posttrain gate``

Rows are only ever added. They form a chain of hashes, which shows a row that was changed, removed or moved; and they
can be rebuilt from the copies, so that a lost or damaged file costs no history.
"""

from __future__ import annotations

import getpass
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from posttrain.errors import ArtifactDamaged
from posttrain.ledger import history, releases
from posttrain.ledger.chain import Row, changed, faults, link
from posttrain.ledger.history import GATES
from posttrain.ledger.lift import Judgement, Lift, same_finding
from posttrain.ledger.releases import Release, Standing
from posttrain.ledger.store import (
    append,
    last_finding,
    last_row,
    ledger_path,
    raw_rows,
    reading,
    rows_ever,
    rows_of,
    writing,
)

__all__ = ["GATES", "Judgement", "Lift", "Release", "Row", "Standing", "check", "lifts", "move", "record"]


def check(root: Path) -> None:
    """Raise before any work is done when an existing ledger below ``root`` cannot be written later."""
    if ledger_path(root).exists():
        with writing(root):
            pass


def record(root: Path, folder: Path, judgement: Judgement) -> None:
    """Add every lift of a verdict once, to the ledger and to ``folder``, the folder of the stage or of the gate.

    A verdict equal to the stage's last one is not added again; one without tasks holds no lift. Return when the rows
    are on disk. Raise DiskFailed when the disk is full, Interrupted when another process holds the ledger for too long,
    ArtifactDamaged when the file is damaged, BadInput when it cannot be opened.
    """
    if not judgement.verdict.tasks:
        return
    with writing(root) as connection:
        former = last_finding(connection, judgement.run, judgement.stage)
        last = last_row(connection)
        finding = judgement.lifts(_time_after(last), _user())
        known = same_finding(former, finding)
        if not known:
            append(connection, link(finding, last))
        # The copy is written before the transaction ends. A crash between the two leaves rows in the copy alone: the
        # same command, or a rebuild, adds them. In the other order, rows of the ledger could lack a copy for ever.
        history.add(folder, former if known else finding)


def move(root: Path, alias: str, standing: Standing | None, unpromoted: str = "") -> Release:
    """Record that ``alias`` names another artifact, or with None the one before, for running servers to follow.

    Raises BadInput for a rollback of a name that has nothing before it, and the errors of ``record``.
    """
    return releases.add(root, alias, standing, unpromoted, _time_after(None), _user())


def lifts(root: Path) -> list[Row]:
    """Return every recorded lift, oldest first; none when there is no ledger.

    Raises ArtifactDamaged naming the rows that were changed after they were written.
    """
    path = ledger_path(root)
    if not path.exists() or (path.stat().st_size == 0 and not history.histories(root)):
        return []
    with reading(root) as connection:
        records = raw_rows(connection)
        if found := faults(records, rows_ever(connection)):
            raise changed(path, found)
        return rows_of(records)


def _time_after(last: Row | None) -> str:
    """Return the present time, or a microsecond after the last row when the clock is behind it."""
    # A rebuild sorts the copies by time. Times that only ever grow give it the order in which the rows were written.
    now = datetime.now(UTC)
    if last is not None:
        now = max(now, _time_of(last) + timedelta(microseconds=1))
    return now.isoformat(timespec="microseconds")


def _time_of(row: Row) -> datetime:
    try:
        return datetime.fromisoformat(row.lift.recorded_at).astimezone(UTC)
    except ValueError:
        raise ArtifactDamaged(f"row {row.seq} of the ledger was changed: {row.lift.recorded_at} is no time") from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may run under a number that has no name
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
