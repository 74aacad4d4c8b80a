"""Whether the ledger still says what was written, and how it is made again from the runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.artifact import read_manifest
from posttrain.errors import ArtifactDamaged, BadInput, Problem
from posttrain.ledger import history
from posttrain.ledger.chain import Row, faults, linked
from posttrain.ledger.lift import Lift
from posttrain.ledger.store import append, empty, path_in, reading, records_in, rows_ever, writing

SHOWN = 10
"""Faults that a message lists."""

Key = tuple[Any, ...]


def require(root: Path) -> None:
    """Raise BadInput when there is no ledger below ``root``."""
    if not path_in(root).exists():
        fix = "A run makes one; posttrain ledger rebuild makes it again from runs; output_root=DIR names another folder"
        raise BadInput(Problem(where=str(path_in(root)), what="there is no ledger", fix=fix))


def verify(root: Path) -> list[dict[str, Any]]:
    """Every row of the ledger, after checking the chain and comparing it with the runs that are there.

    Raises ArtifactDamaged naming what was changed, BadInput when there is no ledger.
    """
    require(root)
    with writing(root) as connection:  # so that no run is between its own copy of a row and the ledger's
        records, ever = records_in(connection), rows_ever(connection)
        found = faults(records, ever) or list(_disagreements(root, records))
    if found:
        more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        listed = "".join(f"\n  {fault}" for fault in found[:SHOWN])
        raise ArtifactDamaged(f"{path_in(root)} is not what was written:{listed}{more}")
    return records


def rebuild(root: Path) -> tuple[int, int]:
    """Make the ledger again from the runs below ``root``; returns how many rows it has and how many were not as now.

    A file that SQLite cannot read is set aside. Raises BadInput, and changes nothing, when the ledger holds rows of
    runs that are not there; ArtifactDamaged when a run contradicts itself.
    """
    if not path_in(root).exists() and not history.histories(root):
        raise BadInput(Problem(where=str(root), what="holds no run that was judged", fix="Give output_root=DIR"))
    _set_aside_unreadable(root)
    with writing(root) as connection:
        lifts = [lift for path in history.histories(root) for lift in _lifts(path)]
        rows = list(linked(sorted(lifts, key=lambda lift: lift.recorded_at), None))
        before = records_in(connection)
        _check_nothing_is_lost(root, before, rows)
        empty(connection)
        append(connection, rows)
        return len(rows), _differences(before, records_in(connection))


def _disagreements(root: Path, records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What the ledger and the runs that are there do not both say."""
    told = {_key(asdict(lift)): asdict(lift) for path in history.histories(root) for lift in _lifts(path)}
    held = {_key(record): record for record in records}
    for key in sorted(told.keys() | held.keys(), key=str):
        row, copy = held.get(key), told.get(key)
        name = " ".join(map(str, key))
        if row is None:
            yield f"a run holds a row that the ledger does not: {name} (posttrain ledger rebuild puts it in)"
        elif copy is None:
            if history.folder_of(root, str(row["run"]), str(row["stage"])).is_dir():
                yield f"row {row['seq']} is not in its run: {name}"
        elif any(row[field] != value for field, value in copy.items()):
            yield f"row {row['seq']} is not what its run holds: {name}"


def _lifts(path: Path) -> list[Lift]:
    """The rows of one stage, which must agree with the manifest of the artifact that lies beside them."""
    lifts = [lift for entry in history.read(path) for lift in entry]
    folder = path.parent / "artifact"
    if folder.exists():
        manifest = read_manifest(folder)
        told = (manifest["parent_digest"], manifest["base"]["digest"], ">".join(manifest["lineage"]))
        about_it = [lift for lift in lifts if lift.artifact == manifest["digest"]]
        if any((lift.parent, lift.base, lift.lineage) != told for lift in about_it):
            raise ArtifactDamaged(f"{path} contradicts the manifest in {folder}")
    return lifts


def _key(values: Mapping[str, Any]) -> Key:
    return tuple(values[name] for name in ("recorded_at", "run", "stage", "task", "metric", "against"))


def _differences(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> int:
    """How many rows are not what they were."""
    old, new = ({record["seq"]: record for record in records} for records in (before, after))
    return sum(old.get(seq) != new.get(seq) for seq in old.keys() | new.keys())


def _check_nothing_is_lost(root: Path, before: Iterable[Mapping[str, Any]], rows: Iterable[Row]) -> None:
    known = {_key(asdict(row.lift)) for row in rows}
    lost = [record for record in before if _key(record) not in known]
    if lost:
        runs = ", ".join(sorted({str(record["run"]) for record in lost}))
        what = f"{len(lost)} rows stand in the ledger alone, of {runs}: no run below {root} holds them"
        raise BadInput(Problem(where=str(path_in(root)), what=what, fix="Bring the runs back, or move the ledger away"))


def _set_aside_unreadable(root: Path) -> None:
    """Move a file away that is no database, with what SQLite left beside it, so that nothing of it is mixed in."""
    path = path_in(root)
    if not path.exists():
        return
    try:
        with reading(root) as connection:
            records_in(connection)
    except ArtifactDamaged:
        number = next(n for n in range(1, 1_000_000) if not path.with_name(f"{path.name}.damaged-{n}").exists())
        for suffix in ("", "-journal"):
            beside = path.with_name(path.name + suffix)
            if beside.exists():
                beside.rename(path.with_name(f"{path.name}.damaged-{number}{suffix}"))
