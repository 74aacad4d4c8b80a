"""A file ``loss.csv`` beside every run."""

from collections.abc import Mapping
from pathlib import Path

from posttrain import Plan, hookimpl


class LossFile:
    """The losses of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @hookimpl
    def step_logged(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"{stage},{step},{metrics['loss']}\n")


@hookimpl
def run_started(plan: Plan, directory: Path) -> LossFile:
    """Return the listener of this run."""
    return LossFile(directory / "loss.csv")
