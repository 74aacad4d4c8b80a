"""The leaderboard as one static page: it filters and sorts by a script of its own, without a server or a request.

Texts of strangers are data in it: JSON that no markup ends, put into the page as text. The policy of the page names its
script by the hash, and allows no other.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from posttrain.ledger import GATES
from posttrain.quoting import one_line
from posttrain.report.leaderboard import OTHER, Board, Entry, cells, title

PAGE = "leaderboard.html"
REPORT = "report.html"


def board_page(boards: Sequence[Board], root: Path, names: Mapping[str, Sequence[str]]) -> str:
    """Return the page for the boards of an output root; ``names`` are the aliases of each digest."""
    environment = Environment(
        loader=PackageLoader("posttrain.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = environment.get_template("leaderboard.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    seen: set[tuple[str, str]] = set()
    found = []
    for board in boards:
        found.append(_board(board, root, names, OTHER if (board.task, board.metric) in seen else ""))
        seen.add((board.task, board.metric))
    data = json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return environment.get_template(PAGE).render(
        root=_text(root.resolve().name), data=Markup(data), script=Markup(script), script_hash=f"sha256-{digest}"
    )


def _board(board: Board, root: Path, names: Mapping[str, Sequence[str]], note: str) -> dict[str, Any]:
    return {
        "task": _text(board.task),
        "title": _text(title(board)),
        "note": note,
        "rows": [_row(entry, board, root, names) for entry in board.entries],
    }


def _row(entry: Entry, board: Board, root: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    shown = [*map(_text, cells(entry, board.scale)), _text(", ".join(names.get(entry.digest, ())))]
    return {
        "digest": _text(entry.digest),
        "cells": shown,
        "keys": [entry.n, entry.score, entry.lift],
        "base": entry.lineage == "base",
        "report": _report(root, entry.run),
    }


@functools.cache
def _text(text: str) -> str:
    """Return a text of a stranger for the page; equal ones are quoted once."""
    return one_line(text).encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _report(root: Path, run: str) -> str:
    """Return the address of a run's report, relative to the page; empty when there is none."""
    if not run or run.startswith(f"{GATES}/") or not os.path.lexists(root / run / REPORT):
        return ""
    return quote(f"{run}/{REPORT}")
