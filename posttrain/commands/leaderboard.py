"""``posttrain leaderboard``: every artifact of the ledger and its base, ranked by task."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.commands.arguments import parse
from posttrain.disk import replace_text
from posttrain.errors import reject, suggest
from posttrain.ledger import lifts, releases
from posttrain.quoting import cell, markdown
from posttrain.report.leaderboard import COLUMNS, OTHER, Board, boards, cells, title

if TYPE_CHECKING:
    from rich.table import Table

HTML = "--html"
MOST_ENTRIES = 50
"""Entries of a board in the terminal unless ``top`` says otherwise."""


def main(words: list[str]) -> int:
    """Rank the artifacts recorded below an output root, by every task or by ``task=NAME``."""
    given = parse("leaderboard", words, ("task", "top", "output_root"), ("table", "markdown", "json"), (HTML,))
    if given.plain:
        fix = f"posttrain leaderboard task={given.plain[0]}"
        reject(f"leaderboard {' '.join(given.plain)}", f"{given.plain[0]} is not key=value", fix)
    root, top = Path(given.settings.get("output_root", "runs")), _top(given.settings.get("top"))
    found = _boards(root, given.settings.get("task"))
    if HTML in given.flags:
        print(_write_page(_first(found, top), root))
    elif given.format == "json":
        print(json.dumps([asdict(board) for board in _first(found, top)], indent=2))
    elif given.format == "markdown":
        print("\n".join(_markdown(_first(found, top))))
    else:
        _print(found, top or MOST_ENTRIES)
    return 0


def _top(given: str | None) -> int | None:
    if given is not None and not (given.isdecimal() and int(given) > 0):
        reject(f"top={given}", "is no number of entries", "Give a whole number, as in top=20")
    return None if given is None else int(given)


def _first(found: Sequence[Board], top: int | None) -> list[Board]:
    return [replace(board, entries=board.entries[:top]) for board in found]


def _write_page(found: Sequence[Board], root: Path) -> Path:
    from posttrain.report.board_page import PAGE, board_page

    names: dict[str, list[str]] = {}
    for alias, history in releases.histories(releases.read(root)).items():
        names.setdefault(history[-1].artifact, []).append(alias)
    replace_text(root / PAGE, board_page(found, root, names))
    return root / PAGE


def _boards(root: Path, task: str | None) -> list[Board]:
    found = boards(row.lift for row in lifts(root))
    if not found:
        fix = "posttrain recipe=quickstart records some; output_root=DIR names another folder of runs"
        reject(str(root), "no results recorded yet", fix)
    chosen = [board for board in found if task in (None, board.task)]
    if not chosen:
        reject(f"task={task}", "no score of this task is recorded", suggest(str(task), {one.task for one in found}))
    return chosen


def _print(found: Sequence[Board], top: int) -> None:
    """Print the tables as wide as the terminal, or in 80 columns elsewhere."""
    from posttrain.console import DataConsole

    console = DataConsole()
    for _, same_task in groupby(found, key=lambda board: (board.task, board.metric)):
        for number, board in enumerate(same_task):
            if number:
                console.print(OTHER, style="yellow")
            console.print(_table(replace(board, entries=board.entries[:top])))
            if (more := len(board.entries) - top) > 0:
                console.print(f"{more:,} more: top={len(board.entries)} shows them, --html writes a page", style="dim")


def _table(board: Board) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from posttrain.console import styled

    table = Table(title=styled(title(board)), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(
            column,
            justify="right" if column in ("n", "score") else "left",
            overflow="fold",
            no_wrap=column not in ("recipe", "lineage", "verdict"),
        )
    for entry in board.entries:
        table.add_row(*map(styled, cells(entry, board.scale)), style="dim" if entry.lineage == "base" else None)
    return table


def _markdown(found: Sequence[Board]) -> list[str]:
    lines: list[str] = []
    quoted = functools.cache(cell)  # a hundred thousand entries have few names, lineages and verdicts
    for _, same_task in groupby(found, key=lambda board: (board.task, board.metric)):
        for number, board in enumerate(same_task):
            lines += ["", OTHER] if number else []
            lines += [
                "",
                f"**{markdown(title(board))}**",
                "",
                f"| {' | '.join(COLUMNS)} |",
                "|---" * len(COLUMNS) + "|",
            ]
            for entry in board.entries:
                lines.append(f"| {' | '.join(map(quoted, cells(entry, board.scale)))} |")
    return lines[1:]
