"""A Progress that keeps all reports of a stage."""

from __future__ import annotations

from collections.abc import Mapping


class Recorder:
    """Record of a stage's reports: its number of steps, each step's metrics, its notes."""

    def __init__(self) -> None:
        self.started: tuple[int, int] = (0, 0)
        """Steps in all, and steps taken before the last checkpoint."""
        self.device_flops: float | None = None
        self.steps: dict[int, Mapping[str, float]] = {}
        self.notes: list[str] = []
        self.parts: list[tuple[int, int, str]] = []
        """Done, total and name of the parts of steps."""

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Keep them."""
        self.started, self.device_flops = (total_steps, done_steps), device_flops

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the step's metrics."""
        self.steps[step] = dict(metrics)

    def part(self, done: int, total: int, what: str) -> None:
        """Keep the part."""
        self.parts.append((done, total, what))

    def note(self, text: str) -> None:
        """Keep the line."""
        self.notes.append(text)
