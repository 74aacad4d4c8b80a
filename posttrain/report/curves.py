"""Charts of a stage's metrics: curves as points of an SVG, ticks as HTML around it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.report.run import StageReport

WIDTH, HEIGHT = 1000, 300
"""Size of the drawing in its own units. The page stretches it to the width of its column, which would distort text:
ticks and dots are therefore HTML, placed in percent."""
MOST_POINTS = 400
"""Points drawn of one curve; a longer curve is thinned."""
TICKS = 4
"""Intervals on an axis, about."""
SMALLEST = 1e-30
"""Absolute values below this are drawn as zero."""
COUNTERS = (
    "tokens", "trained_tokens", "tokens_per_second", "model_flops", "mfu", "answers", "loss_tokens", "batches",
)  # fmt: skip
"""Metrics of every step without a chart: they do not show the course of training."""
MAIN = (("loss", "eval_loss"), ("lr",))
"""Metrics of the charts shown for every stage; each further metric has a chart of its own."""

Point = tuple[int, float]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled place on an axis."""

    label: str
    place: float
    """Percent from the left, or from the top."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric."""

    name: str
    points: str
    """Attribute of a polyline: ``x,y x,y``."""
    dots: tuple[tuple[float, float], ...]
    """Places in percent, for a curve of few points: a line through one point is invisible."""
    last: str
    """Its last value and step, as text."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves on common axes."""

    curves: tuple[Curve, ...]
    y_ticks: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]

    @property
    def title(self) -> str:
        """The names of its curves."""
        return " and ".join(curve.name for curve in self.curves)


def main_charts(stage: StageReport) -> list[Chart]:
    """Return the charts of the loss, with the eval loss where it was measured, and of the learning rate."""
    return charts_of(stage, MAIN)


def further_charts(stage: StageReport, shown: Sequence[Sequence[str]] = ()) -> list[Chart]:
    """Return a chart for each further metric of the stage, but those ``shown`` elsewhere."""
    known = {*COUNTERS, *(name for names in (*MAIN, *shown) for name in names)}
    return charts_of(stage, [(name,) for name in stage.metrics if name not in known])


def charts_of(stage: StageReport, groups: Iterable[Sequence[str]]) -> list[Chart]:
    """Return a chart for each group of metrics, those that were logged on common axes."""
    return [chart for names in groups if (chart := _chart(stage, names)) is not None]


def _chart(stage: StageReport, names: Sequence[str]) -> Chart | None:
    series = {name: thin(stage.metrics[name], MOST_POINTS) for name in names if stage.metrics.get(name)}
    if not series:
        return None
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    y_marks = marks(min(values), max(values))
    x_axis = _Axis(min(steps), max(max(steps), min(steps) + 1))
    y_axis = _Axis(y_marks[0], y_marks[-1])
    x_marks = [
        mark for mark in marks(x_axis.low, x_axis.high) if mark.is_integer() and x_axis.low <= mark <= x_axis.high
    ]
    return Chart(
        curves=tuple(_curve(name, points, x_axis, y_axis) for name, points in series.items()),
        y_ticks=tuple(Tick(label=f"{mark:.6g}", place=100 - y_axis.percent(mark)) for mark in y_marks),
        x_ticks=tuple(Tick(label=f"{mark:,.0f}", place=x_axis.percent(mark)) for mark in x_marks),
    )


@dataclass(frozen=True)
class _Axis:
    """The values at the two ends of an axis."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """Return the place of a value, in percent from the low end."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def _curve(name: str, points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> Curve:
    places = [(x_axis.percent(step), 100 - y_axis.percent(value)) for step, value in points]
    return Curve(
        name=name,
        points=" ".join(f"{x * WIDTH / 100:.1f},{y * HEIGHT / 100:.1f}" for x, y in places),
        dots=tuple(places) if len(places) <= MOST_POINTS // 20 else (),
        last=f"{points[-1][1]:.3g} at step {points[-1][0]:,}",
    )


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most ``most`` points of a curve: the lowest and the highest of each stretch."""
    # Every n-th point, or a mean, would hide the single step at which a loss explodes.
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    kept = [{min(stretch, key=_value), max(stretch, key=_value)} for stretch in stretches]
    return [point for chosen in kept for point in sorted(chosen)]


def marks(low: float, high: float) -> list[float]:
    """Return about four round numbers, the first at or below ``low``, the last at or above ``high``."""
    size = max(abs(low), abs(high))
    if size < SMALLEST:
        low, high = -0.5, 0.5
    elif high - low <= 1e-6 * size:  # a constant, save for rounding: the axis needs a width all the same
        low, high = low - size / 2, high + size / 2
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _value(point: Point) -> float:
    return point[1]
