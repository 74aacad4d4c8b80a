"""Reports of a run: read from what it left on disk, so that they can be made again at any time."""

from __future__ import annotations

from pathlib import Path

from posttrain.disk import replace_text

PLAIN_WIDTH = 140
"""Columns of a table that goes into a file or a pipe."""


def write(path: Path) -> None:
    """Write report.md, report.html and junit.xml into the directory of a run."""
    from posttrain.report.junit import junit
    from posttrain.report.markdown import markdown
    from posttrain.report.page import page
    from posttrain.report.run import read_report

    found = read_report(path)
    for name, text in (("report.md", markdown(found)), ("report.html", page(found)), ("junit.xml", junit(found))):
        # A model may have written half a surrogate pair, which no encoding holds.
        replace_text(path / name, text.encode("utf-8", "replace").decode("utf-8"))


def show(path: Path) -> None:
    """Print the final table of the run in ``path`` on standard output."""
    from rich.console import Console

    from posttrain.report.run import read_report
    from posttrain.report.terminal import print_report

    console = Console()
    print_report(read_report(path), console if console.is_terminal else Console(width=PLAIN_WIDTH))
