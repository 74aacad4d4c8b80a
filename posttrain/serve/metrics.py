"""Figures of a server in Prometheus' text form."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the ranges of seconds."""
HELP = {
    "requests_total": ("counter", "Requests by model and status."),
    "tokens_total": ("counter", "Tokens of prompts and answers by model."),
    "request_seconds": ("histogram", "Time of complete requests by model."),
    "first_token_seconds": ("histogram", "Time to the first token by model."),
    "waiting": ("gauge", "Answers that have not begun."),
    "running": ("gauge", "Answers in the making."),
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms; their labels are digests, states and kinds alone, and no word of a request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, Labels]] = Counter()
        self._seconds: dict[tuple[str, Labels], list[float]] = {}

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add a time to a histogram."""
        with self._lock:
            found = self._seconds.setdefault((name, tuple(sorted(labels.items()))), [0.0] * (len(BUCKETS) + 2))
            for place, end in enumerate(BUCKETS):
                found[place] += seconds <= end
            found[-2] += 1
            found[-1] += seconds

    def text(self, gauges: Mapping[str, int]) -> str:
        """Return all figures, with the present values of ``gauges``."""
        with self._lock:
            return "\n".join(self._lines(gauges)) + "\n"

    def _lines(self, gauges: Mapping[str, int]) -> Iterator[str]:
        for name, (kind, summary) in HELP.items():
            yield f"# HELP posttrain_{name} {summary}"
            yield f"# TYPE posttrain_{name} {kind}"
            if name in gauges:
                yield f"posttrain_{name} {gauges[name]}"
            for (counter, labels), value in sorted(self._counts.items()):
                if counter == name:
                    yield f"posttrain_{name}{_braces(labels)} {value}"
            for (histogram, labels), values in sorted(self._seconds.items()):
                if histogram == name:
                    yield from _histogram(f"posttrain_{name}", labels, values)


def _histogram(name: str, labels: Labels, values: list[float]) -> Iterator[str]:
    for end, count in zip((*map(str, BUCKETS), "+Inf"), values, strict=False):
        yield f"{name}_bucket{_braces((*labels, ('le', end)))} {count:g}"
    yield f"{name}_count{_braces(labels)} {values[-2]:g}"
    yield f"{name}_sum{_braces(labels)} {values[-1]:g}"


def _braces(labels: Labels) -> str:
    listed = ",".join(f'{name}="{value}"' for name, value in labels)
    return f"{{{listed}}}" if listed else ""
