"""``posttrain ledger``: every lift ever recorded, exported, checked, or made again from the runs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from posttrain.commands.words import understood
from posttrain.errors import BadInput, Problem, suggest
from posttrain.ledger import Row, lifts
from posttrain.ledger.audit import rebuild, require_ledger, verify
from posttrain.ledger.store import COLUMNS, ledger_path

ACTIONS = ("export", "rebuild", "verify")


def ledger_command(words: list[str]) -> int:
    """Export, verify or rebuild the ledger of an output root (``output_root=DIR``, ./runs by default)."""
    action, *others = words or [""]
    if action not in ACTIONS:
        fix = suggest(action, ACTIONS)
        raise BadInput(Problem(where=f"ledger {action}".strip(), what="is not something to do with it", fix=fix))
    formats = ("jsonl", "csv") if action == "export" else ()
    given = understood(f"ledger {action}", others, ("output_root",), formats)
    if given.plain:
        raise BadInput(Problem(where=f"ledger {' '.join(words)}", what="is not key=value", fix="output_root=DIR"))
    root = Path(given.settings.get("output_root", "runs"))
    if action == "export":
        require_ledger(root)
        _export(lifts(root), given.format)
    elif action == "verify":
        records = verify(root)
        head = f", the last one {records[-1]['hash']}" if records else ""
        print(f"{ledger_path(root)}: {len(records):,} rows, every one as it was written{head}")
    else:
        count, changed = rebuild(root)
        print(f"{ledger_path(root)}: {count:,} rows from the runs below {root}, {changed:,} of them not as before")
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
