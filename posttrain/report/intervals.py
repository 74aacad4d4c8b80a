"""The plot of a stage's lifts: every paired difference with its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.gate.spec import TaskVerdict
from posttrain.report.curves import Tick, marks
from posttrain.report.scores import Scale, scale_of

MARGIN = 4
"""Percent of the plot's width left free on either side."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One comparison, with the places of its marks in percent of the plot's width."""

    task: TaskVerdict
    scale: Scale
    low: float
    lift: float
    high: float
    threshold: float
    """The lower bound must lie to the right of it."""
    ticks: tuple[Tick, ...]

    @property
    def text(self) -> str:
        """The lift with its bounds, as text."""
        return self.scale.interval(self.task.lift, self.task.low, self.task.high)

    @property
    def required(self) -> str:
        """The condition of the gate, as text."""
        return f"needs > {self.scale.change(self.task.threshold)}"

    @property
    def note(self) -> str:
        """Method of the bounds, Holm's bound and the bootstrap's, as text; empty when there are none."""
        task, change = self.task, self.scale.change
        words = [task.method] if task.method else []
        if task.adjusted_low is not None:
            words.append(f"> {change(task.adjusted_low)} after Holm's correction")
        if task.bootstrap_low is not None and task.bootstrap_high is not None:
            words.append(f"bootstrap [{change(task.bootstrap_low)}, {change(task.bootstrap_high)}]")
        return "; ".join(words)

    @property
    def fields(self) -> str:
        """The fields of the task's slices, as text."""
        return ", ".join(dict.fromkeys(part.field for part in self.task.slices))

    @property
    def scores(self) -> dict[str, str]:
        """The score of every system."""
        return {name: self.scale.score(getattr(self.task, name)) for name in ("base", "parent", "candidate")}


def intervals(tasks: Sequence[TaskVerdict]) -> list[Interval]:
    """Return a line of the plot per comparison; all shares have one axis, other scores one per task."""
    return [_interval(task, [other for other in tasks if _axis(other) == _axis(task)]) for task in tasks]


def _axis(task: TaskVerdict) -> str:
    # Lifts of shares can be compared by eye. A log-likelihood on their axis would shrink them to dots at zero.
    return "shares" if scale_of(task).factor == 100 else task.task


def _interval(task: TaskVerdict, together: Sequence[TaskVerdict]) -> Interval:
    scale = scale_of(task)
    shown = [value for other in together for value in (other.low, other.high, other.lift, other.threshold)]
    # Zero and the thresholds are on the axis, so that a bar shows at a glance on which side of either it lies.
    low, high = scale.factor * min(0, *shown), scale.factor * max(0, *shown)
    width = high - low or 1.0

    def place(value: float) -> float:
        return round(MARGIN + (100 - 2 * MARGIN) * (value - low) / width, 2)

    return Interval(
        task=task,
        scale=scale,
        low=place(scale.factor * task.low),
        lift=place(scale.factor * task.lift),
        high=place(scale.factor * task.high),
        threshold=place(scale.factor * task.threshold),
        ticks=tuple(
            Tick(label=f"{mark:+g}" if mark else "0", place=place(mark))
            for mark in marks(low, high)
            if low <= mark <= high
        ),
    )
