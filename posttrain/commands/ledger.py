"""``posttrain ledger``: export, verify or rebuild the record of every lift."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from posttrain.commands.arguments import parse
from posttrain.errors import nearest, reject
from posttrain.ledger import Row, lifts
from posttrain.ledger.audit import rebuild, require_ledger, verify
from posttrain.ledger.store import COLUMNS, ledger_path

ACTIONS = ("export", "rebuild", "verify")


def main(words: list[str]) -> int:
    """Export, verify or rebuild the ledger of an output root (``output_root=DIR``, ./runs by default)."""
    action, *others = words or [""]
    if action not in ACTIONS:
        close = nearest(action, ACTIONS)
        fix = f"Did you mean {close}?" if close else f"posttrain ledger {ACTIONS[0]}"
        reject(f"ledger {action}".strip(), f"needs one of {', '.join(ACTIONS)}", fix)
    formats = ("jsonl", "csv") if action == "export" else ()
    given = parse(f"ledger {action}", others, ("output_root",), formats)
    if given.plain:
        reject(
            f"ledger {' '.join(words)}",
            f"{given.plain[0]} is not key=value",
            "output_root=DIR names the folder of runs",
        )
    root = Path(given.settings.get("output_root", "runs"))
    if action == "export":
        require_ledger(root)
        _export(lifts(root), given.format)
    elif action == "verify":
        records = verify(root)
        head = f", the last one {records[-1]['hash']}" if records else ""
        print(f"{ledger_path(root)}: {len(records):,} rows, none changed since it was written{head}")
    else:
        count, changed = rebuild(root)
        print(f"{ledger_path(root)}: {count:,} rows rebuilt from the runs below {root}, {changed:,} of them changed")
    return 0


def _export(rows: Sequence[Row], form: str) -> None:
    records = [{"seq": row.seq, **asdict(row.lift), "previous": row.previous, "hash": row.hash} for row in rows]
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    else:
        for record in records:
            print(json.dumps(record))
