"""The audit: the ledger checked against its chain and its runs, and rebuilt from the runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.artifact import MANIFEST, Manifest, read_manifest
from posttrain.errors import ArtifactDamaged, BadInput, Problem
from posttrain.ledger import history, releases
from posttrain.ledger.chain import Row, changed, faults, link
from posttrain.ledger.lift import Lift
from posttrain.ledger.store import append, clear, ledger_path, raw_rows, reading, rows_ever, writing

Key = tuple[Any, ...]


def require_ledger(root: Path) -> None:
    """Raise BadInput when there is no ledger below ``root``."""
    if not ledger_path(root).exists():
        fix = "A run makes one; posttrain ledger rebuild makes it again from runs; output_root=DIR names another folder"
        raise BadInput(Problem(where=str(ledger_path(root)), what="there is no ledger", fix=fix))


def verify(root: Path) -> list[dict[str, Any]]:
    """Check the chain, compare the ledger with the existing runs, and return every row as SQLite holds it.

    Raise ArtifactDamaged naming the changed rows, BadInput when there is no ledger. A run that was removed or
    moved away is no fault.
    """
    require_ledger(root)
    with writing(root) as connection:  # no run may be between its copy of a row and the ledger's
        records, ever = raw_rows(connection), rows_ever(connection)
        found = faults(records, ever) or list(_disagreements(root, records))
        found += releases.faults(connection, root, records)
    if found:
        raise changed(ledger_path(root), found)
    return records


def rebuild(root: Path) -> tuple[int, int]:
    """Rebuild the ledger from the runs below ``root``; return the number of its rows, and of the changed ones.

    A file unreadable for SQLite is set aside. Raise BadInput, and change nothing, when the ledger holds rows of missing
    runs; ArtifactDamaged when a run contradicts itself.
    """
    if not ledger_path(root).exists() and not history.histories(root):
        raise BadInput(Problem(where=str(root), what="holds no judged run", fix="Give output_root=DIR"))
    _set_aside_unreadable(root)
    with writing(root) as connection:
        lifts = [lift for path in history.histories(root) for lift in _lifts(path)]
        rows = list(link(sorted(lifts, key=lambda lift: lift.recorded_at), None))
        before = raw_rows(connection)
        _check_nothing_is_lost(root, before, rows)
        clear(connection)
        append(connection, rows)
        releases.rebuild(connection, root, rows)
        return len(rows), _count_differences(before, raw_rows(connection))


def _disagreements(root: Path, records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each row that differs between the ledger and the existing runs."""
    copies = {_key(asdict(lift)): asdict(lift) for path in history.histories(root) for lift in _lifts(path)}
    held = {_key(record): record for record in records}
    for key in sorted(copies.keys() | held.keys(), key=str):
        row, copy = held.get(key), copies.get(key)
        name = " ".join(map(str, key))
        if row is None:
            yield f"a run holds a row that the ledger lacks: {name} (posttrain ledger rebuild adds it)"
        elif copy is None:
            if history.folder_of(root, str(row["run"]), str(row["stage"])).is_dir():
                yield f"row {row['seq']} is not in its run: {name}"
        elif any(row[field] != value for field, value in copy.items()):
            yield f"row {row['seq']} differs from the copy in its run: {name}"


def _lifts(path: Path) -> list[Lift]:
    """Read the history of one stage; raise ArtifactDamaged when it contradicts the artifact's manifest."""
    lifts = [lift for finding in history.read(path) for lift in finding]
    folder = path.parent / "artifact"
    if folder.exists():
        values = read_manifest(folder)
        manifest = Manifest.from_json(values, folder / MANIFEST)
        lineage = (manifest.parent_digest, manifest.base.digest, ">".join(manifest.lineage))
        about_it = [lift for lift in lifts if lift.artifact == values["digest"]]
        if any((lift.parent, lift.base, lift.lineage) != lineage for lift in about_it):
            raise ArtifactDamaged(f"{path} contradicts the manifest in {folder}")
    return lifts


def _key(values: Mapping[str, Any]) -> Key:
    return tuple(values[name] for name in ("recorded_at", "run", "stage", "task", "metric", "against"))


def _count_differences(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> int:
    """Count the rows added, removed or changed."""
    old, new = ({record["seq"]: record for record in records} for records in (before, after))
    return sum(old.get(seq) != new.get(seq) for seq in old.keys() | new.keys())


def _check_nothing_is_lost(root: Path, before: Iterable[Mapping[str, Any]], rows: Iterable[Row]) -> None:
    known = {_key(asdict(row.lift)) for row in rows}
    lost = [record for record in before if _key(record) not in known]
    if lost:
        runs = ", ".join(sorted({str(record["run"]) for record in lost}))
        what = f"{len(lost)} rows are in the ledger alone, of {runs}: no run below {root} holds them"
        raise BadInput(
            Problem(where=str(ledger_path(root)), what=what, fix="Bring the runs back, or move the ledger away")
        )


def _set_aside_unreadable(root: Path) -> None:
    """Move away a file that is no database."""
    path = ledger_path(root)
    if not path.exists():
        return
    try:
        with reading(root) as connection:
            raw_rows(connection)
    except ArtifactDamaged:
        number = next(n for n in range(1, 1_000_000) if not path.with_name(f"{path.name}.damaged-{n}").exists())
        # The journal goes with it: SQLite would roll it back into the new file.
        for suffix in ("", "-journal"):
            damaged = path.with_name(path.name + suffix)
            if damaged.exists():
                damaged.rename(path.with_name(f"{path.name}.damaged-{number}{suffix}"))
