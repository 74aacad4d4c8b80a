"""The history of a stage, or of a gate about an adapter: its own copy of its rows, to rebuild the ledger from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from posttrain.digests import canonical
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.ledger.lift import Lift, lift_from_json, same_finding
from posttrain.saved import lines_of, parse_json, read_text

HISTORY = "lifts.jsonl"
GATES = "gates"
"""Folder of ``posttrain gate``, with a folder for each gate about one adapter."""


def add(folder: Path, finding: Sequence[Lift]) -> None:
    """Write a finding at the end, in place of an equal last one."""
    path = folder / HISTORY
    findings = read(path) if os.path.lexists(path) else []
    if findings and same_finding(findings[-1], finding):
        findings = findings[:-1]
    lines = [canonical(asdict(lift)) for each in [*findings, finding] for lift in each]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def read(path: Path) -> list[list[Lift]]:
    """Read the findings of a stage, oldest first; raise ArtifactDamaged naming the first line that is no lift."""
    findings: list[list[Lift]] = []
    if not (text := read_text(path)).strip():
        raise ArtifactDamaged(f"{path} is empty: every recorded lift of its stage is missing")
    for number, line in enumerate(lines_of(text), start=1):
        try:
            lift = lift_from_json(parse_json(line, f"{path}:{number}")) if line else None
        except ValueError as error:
            raise ArtifactDamaged(f"{path}:{number} is not a lift: {error}") from None
        if lift is None:
            continue
        if findings and findings[-1][0].recorded_at == lift.recorded_at:
            findings[-1].append(lift)
        else:
            findings.append([lift])
    return findings


def histories(root: Path) -> list[Path]:
    """Return the history of every stage of every run below ``root``, and of every gate about an adapter."""
    folders = [*root.glob("*/stages/*"), *root.glob(f"{GATES}/*")]
    return sorted(path for folder in folders if os.path.lexists(path := folder / HISTORY))


def folder_of(root: Path, run: str, stage: str) -> Path:
    """Return the folder with the history of a run's stage."""
    return root / run if run.startswith(f"{GATES}/") else root / run / "stages" / stage
