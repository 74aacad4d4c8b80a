"""``posttrain leaderboard``: every artifact of the ledger and its base, ranked by task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.commands.arguments import parse
from posttrain.errors import reject, suggest
from posttrain.ledger import lifts
from posttrain.quoting import cell, markdown
from posttrain.report.leaderboard import Board, Entry, boards
from posttrain.report.scores import Scale

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("artifact", "recipe", "lineage", "n", "score", "lift over base", "verdict")
OTHER = "Other documents or settings than in the board above; do not compare scores across the two."


def main(words: list[str]) -> int:
    """Rank the artifacts recorded below an output root, by every task or by ``task=NAME``."""
    given = parse("leaderboard", words, ("task", "output_root"), ("table", "markdown", "json"))
    if given.plain:
        fix = f"posttrain leaderboard task={given.plain[0]}"
        reject(f"leaderboard {' '.join(given.plain)}", f"{given.plain[0]} is not key=value", fix)
    found = _boards(Path(given.settings.get("output_root", "runs")), given.settings.get("task"))
    if given.format == "json":
        print(json.dumps([asdict(board) for board in found], indent=2))
    elif given.format == "markdown":
        print("\n".join(_markdown(found)))
    else:
        _print(found)
    return 0


def _boards(root: Path, task: str | None) -> list[Board]:
    found = boards(row.lift for row in lifts(root))
    if not found:
        fix = "posttrain recipe=quickstart records some; output_root=DIR names another folder of runs"
        reject(str(root), "no results recorded yet", fix)
    chosen = [board for board in found if task in (None, board.task)]
    if not chosen:
        reject(f"task={task}", "no score of this task is recorded", suggest(str(task), {one.task for one in found}))
    return chosen


def _title(board: Board) -> str:
    better = "" if board.higher_is_better else ", less is better"
    return f"{board.task}: {board.metric}, {board.n:,} documents{better}"


def _cells(entry: Entry, scale: Scale) -> tuple[str, ...]:
    lift = ""
    if entry.lift is not None and entry.low is not None and entry.high is not None:
        lift = scale.interval(entry.lift, entry.low, entry.high)
    score = scale.score(entry.score)
    name = "/".join(entry.name.split("/")[-2:])  # the end of a path tells it from others
    return (entry.digest[:8], name, entry.lineage, f"{entry.n:,}", score, lift, entry.verdict)


def _print(found: Sequence[Board]) -> None:
    """Print the tables as wide as the terminal, or in 80 columns elsewhere."""
    from posttrain.console import DataConsole

    console = DataConsole()
    for _, same_task in groupby(found, key=lambda board: (board.task, board.metric)):
        for number, board in enumerate(same_task):
            if number:
                console.print(OTHER, style="yellow")
            console.print(_table(board))


def _table(board: Board) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from posttrain.console import styled

    table = Table(title=styled(_title(board)), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(
            column,
            justify="right" if column in ("n", "score") else "left",
            overflow="fold",
            no_wrap=column not in ("recipe", "lineage", "verdict"),
        )
    for entry in board.entries:
        cells = _cells(entry, board.scale)
        table.add_row(*map(styled, cells), style="dim" if entry.lineage == "base" else None)
    return table


def _markdown(found: Sequence[Board]) -> list[str]:
    lines: list[str] = []
    for _, same_task in groupby(found, key=lambda board: (board.task, board.metric)):
        for number, board in enumerate(same_task):
            lines += ["", OTHER] if number else []
            lines += [
                "",
                f"**{markdown(_title(board))}**",
                "",
                f"| {' | '.join(COLUMNS)} |",
                "|---" * len(COLUMNS) + "|",
            ]
            for entry in board.entries:
                lines.append(f"| {' | '.join(map(cell, _cells(entry, board.scale)))} |")
    return lines[1:]
