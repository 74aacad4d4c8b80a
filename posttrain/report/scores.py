"""Scores, lifts and durations as text: shares in points of 100, other scores as they are."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.gate.spec import TaskVerdict


@dataclass(frozen=True)
class Scale:
    """The unit of the scores of one task."""

    factor: int
    """100 for shares, 1 for other scores."""

    @classmethod
    def of(cls, *scores: float) -> Scale:
        """Return the scale of scores shown side by side: points of 100 when all of them are shares."""
        return cls(100 if all(0 <= score <= 1 for score in scores) else 1)

    def score(self, value: float) -> str:
        """Write a score."""
        return f"{100 * value:.1f}" if self.factor == 100 else f"{value:.4g}"

    def change(self, value: float) -> str:
        """Write a difference, with its sign; one that rounds to zero is ``+0``."""
        text = f"{100 * value:+.1f}" if self.factor == 100 else f"{value:+.4g}"
        return text.replace("-", "+") if float(text) == 0 else text

    def interval(self, lift: float, low: float, high: float) -> str:
        """Write a lift with its bounds."""
        return f"{self.change(lift)} [{self.change(low)}, {self.change(high)}]"


def scale_of(task: TaskVerdict) -> Scale:
    """Return the scale of a task in a verdict."""
    return Scale.of(task.base, task.parent, task.candidate)


def clock(seconds: float | None) -> str:
    """Write a duration as minutes and seconds, or as hours, minutes and seconds; nothing for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
