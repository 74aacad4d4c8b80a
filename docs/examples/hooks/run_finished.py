"""A log with one line for every run."""

from datetime import UTC, datetime
from pathlib import Path

from posttrain import hookimpl


@hookimpl
def run_finished(directory: Path, state: str) -> None:
    """Append time, name and state of the run to ``runs.log`` beside it."""
    with (directory.parent / "runs.log").open("a", encoding="utf-8") as stream:
        stream.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M} {directory.name} {state}\n")
