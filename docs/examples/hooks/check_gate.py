"""A check that no task of a gate has changed since its review."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from posttrain import Problem, Step, hookimpl

REVIEWED = Path("reviewed.txt")
"""The SHA-256 of each reviewed task file, one a line."""


@hookimpl
def check_gate(step: Step) -> Sequence[Problem]:
    """Reject task files that are not on the list."""
    reviewed = REVIEWED.read_text(encoding="utf-8").split()
    files = {name: Path(task.task) for name, task in step.tasks.items() if task.task and task.task.endswith(".yaml")}
    return [
        Problem(where=f"{step.name}.gate.tasks.{name}", what=f"{file} is not reviewed", fix=f"Add it to {REVIEWED}")
        for name, file in files.items()
        if sha256(file.read_bytes()).hexdigest() not in reviewed
    ]
