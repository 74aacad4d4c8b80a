"""Reports of a run. They are made from the files in its directory, and can be made again at any time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.disk import replace_text

if TYPE_CHECKING:
    from posttrain.report.run import RunReport

PAGE = "report.html"
"""Name of the page in the folder of a run or of a gate's evidence."""


def write(path: Path) -> list[str]:
    """Write report.md, report.html and junit.xml into the directory of a run; return the damage found in it."""
    from posttrain.report.junit import junit
    from posttrain.report.page import page
    from posttrain.report.run import read_report
    from posttrain.report.table import markdown

    report = read_report(path)
    for name, text in (("report.md", markdown(report)), (PAGE, page(report)), ("junit.xml", junit(report))):
        _write(path / name, text)
    return [stage.damage for stage in report.stages if stage.damage is not None]


def write_gate(report: RunReport) -> None:
    """Write the page of one gate about an existing adapter into the folder of its evidence, and how it was asked."""
    from posttrain.report.page import page
    from posttrain.report.run import GATE, gate_record

    _write(report.path / GATE, gate_record(report))
    _write(report.path / PAGE, page(report))


def _write(path: Path, text: str) -> None:
    # A model may have written half a surrogate pair, which no encoding holds.
    replace_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def show(path: Path) -> None:
    """Print the final table of the run in ``path``, and the path of its report.html."""
    from posttrain.report.run import read_report

    show_report(read_report(path))


def show_report(report: RunReport) -> None:
    """Print the final table of a run or of a gate, and the path of its report.html."""
    from posttrain.report.table import print_table, table_console

    console, path = table_console(), report.path
    print_table(report, console)
    console.print(f"{path / PAGE}", style="dim")
