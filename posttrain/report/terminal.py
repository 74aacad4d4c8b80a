"""The final table on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posttrain.report.rows import COLUMNS, reasons, remarks, table_rows
from posttrain.report.run import RunReport

COLOURS = {"pass": "green", "promoted": "green", "fail": "red", "refused": "red", "undecided": "yellow"}
RIGHT = ("base", "parent", "candidate", "tokens", "time")


def print_report(report: RunReport, console: Console) -> None:
    """Print the table of a run, and where the whole report is."""
    print_table(report, console)
    console.print(f"{report.path / 'report.html'}", style="dim", highlight=False)


def print_table(report: RunReport, console: Console) -> None:
    """Print the table of a run with the reason of every verdict; shares are in points of 100."""
    table = Table(
        title=f"{report.state.recipe}: {report.state.state}", title_justify="left", header_style="bold", box=SIMPLE
    )
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in RIGHT else "left", overflow="fold")
    previous = None
    for stage, *cells in table_rows(report):
        if previous not in (None, stage):
            table.add_section()
        colour = COLOURS.get(cells[5], "default")
        cells[5] = f"[{colour}]{cells[5]}[/{colour}]"
        table.add_row("" if stage == previous else stage, *cells)
        previous = stage
    console.print(table)
    for stage, reason in reasons(report):
        console.print(f"[bold]{stage}[/bold]: {reason}", highlight=False)
    for each in report.state.stages:
        for remark in remarks(each):
            console.print(f"[yellow]{each.name}[/yellow]: {escape(remark)}", highlight=False)
