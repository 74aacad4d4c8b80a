"""The copy of its rows that a stage keeps, and a gate about an adapter; the ledger can be rebuilt from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from posttrain.digests import canonical
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.ledger.lift import Lift, lift_from_json, same_finding

NAME = "lifts.jsonl"
GATES = "gates"
"""What ``posttrain gate`` judged lies here, each gate about one adapter in a folder of its own."""


def keep(folder: Path, entry: Sequence[Lift]) -> None:
    """Write the rows of one verdict at the end, in place of a last one that says the same."""
    path = folder / NAME
    entries = read(path) if path.exists() else []
    if entries and same_finding(entries[-1], entry):
        entries = entries[:-1]
    lines = [canonical(asdict(lift)) for each in [*entries, entry] for lift in each]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def read(path: Path) -> list[list[Lift]]:
    """The rows of a stage, verdict by verdict; raises ArtifactDamaged naming the line that is not one."""
    entries: list[list[Lift]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            lift = lift_from_json(json.loads(line)) if line else None
        except ValueError as error:
            raise ArtifactDamaged(f"{path}:{number} is not a lift: {error}") from None
        if lift is None:
            continue
        if entries and entries[-1][0].recorded_at == lift.recorded_at:
            entries[-1].append(lift)
        else:
            entries.append([lift])
    return entries


def histories(root: Path) -> list[Path]:
    """The histories of every stage of every run below ``root``, and of every gate about an adapter."""
    return sorted([*root.glob(f"*/stages/*/{NAME}"), *root.glob(f"{GATES}/*/{NAME}")])


def folder_of(root: Path, run: str, stage: str) -> Path:
    """Where the history of rows lies."""
    return root / run if run.startswith(f"{GATES}/") else root / run / "stages" / stage
