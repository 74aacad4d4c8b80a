"""How scores and lifts are written: shares in points of 100, other scores as they are."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.gate.spec import TaskVerdict


@dataclass(frozen=True)
class Scale:
    """How the scores of one task are written."""

    factor: int
    """100 for shares, 1 for other scores."""

    @classmethod
    def of(cls, *scores: float) -> Scale:
        """The scale for scores that stand side by side."""
        return cls(100 if all(0 <= score <= 1 for score in scores) else 1)

    def score(self, value: float) -> str:
        """A score."""
        return f"{100 * value:.1f}" if self.factor == 100 else f"{value:.4g}"

    def change(self, value: float) -> str:
        """A difference, with its sign."""
        text = f"{100 * value:+.1f}" if self.factor == 100 else f"{value:+.4g}"
        return text.replace("-", "+") if float(text) == 0 else text

    def interval(self, lift: float, low: float, high: float) -> str:
        """A lift with its bounds."""
        return f"{self.change(lift)} [{self.change(low)}, {self.change(high)}]"


def scale_of(task: TaskVerdict) -> Scale:
    """The scale of a task in a verdict."""
    return Scale.of(task.base, task.parent, task.candidate)


def clock(seconds: float | None) -> str:
    """A duration as minutes and seconds, or as hours, minutes and seconds."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
