"""The reason of a comparison's state, in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from posttrain.gate.evidence import Mean
from posttrain.gate.roles import RULES

if TYPE_CHECKING:
    from posttrain.gate.comparison import Comparison, Decision
    from posttrain.gate.evidence import Evidence


def reason(comparison: Comparison, decision: Decision, confidence: float) -> str:
    """Return the figures that decided, or the documents that would; ``confidence`` is the gate's."""
    if comparison.evidence is None:
        return "there are no documents"
    words = _Words(comparison, decision, comparison.evidence, confidence)
    found = words.of_difference() if words.rule.paired else words.of_limit()
    return f"{found}; it is stopped early, as it can hardly pass any more" if decision.hopeless else found


class _Words:
    """The figures of one comparison, as text."""

    def __init__(self, comparison: Comparison, decision: Decision, evidence: Evidence, confidence: float) -> None:
        self._comparison, self._decision, self._evidence = comparison, decision, evidence
        self._confidence = confidence
        self.rule = RULES[comparison.role]

    def of_difference(self) -> str:
        """Return the reason of a paired comparison."""
        show, decision, evidence = self._change, self._decision, self._evidence
        change = f"{self.rule.change} {show(evidence.mean)}{self._unit}"
        low, high, threshold = show(decision.bounds.low), show(decision.bounds.high), show(self._comparison.threshold)
        if decision.state == "pass":
            return f"{change}, and its lower bound {low} exceeds {threshold}{self._correction} ({self._size})"
        if decision.state == "fail":
            return f"{change}, and even its upper bound {high} {self.rule.failing} {threshold} ({self._size})"
        if decision.bounds.low > self._comparison.threshold:
            alone = f"{change}, and its lower bound {low} exceeds {threshold} by itself"
            return f"{alone}, but not{self._correction} ({self._size}); {self._advice}"
        open_reason = f"{change}, but its lower bound {low} does not exceed {threshold}"
        return f"{open_reason}: at {self._size} {self._indistinct}; {self._advice}"

    def of_limit(self) -> str:
        """Return the reason of a limit: the score itself, and the bound on the side of its threshold."""
        comparison, bounds = self._comparison, self._decision.bounds
        more, limit = comparison.higher_is_better, self._score(comparison.limit or 0.0)
        score, low = self._score(comparison.means["candidate"]), self._bound(bounds.low)
        side, wrong_side = ("above", "below") if more else ("below", "above")
        bound, other = ("lower", "upper") if more else ("upper", "lower")
        if self._decision.state == "pass":
            return f"score {score}, and its {bound} bound {low} lies {side} {limit} ({self._size})"
        if self._decision.state == "fail":
            high = self._bound(bounds.high)
            return f"score {score}, and even its {other} bound {high} lies {wrong_side} {limit} ({self._size})"
        open_reason = f"score {score}, but its {bound} bound {low} does not lie {side} {limit}"
        return f"{open_reason}: at {self._size} that cannot be told from {limit}; {self._advice}"

    @property
    def _unit(self) -> str:
        return " points" if self._comparison.fractions else ""

    @property
    def _size(self) -> str:
        evidence = self._evidence
        if isinstance(evidence, Mean) and evidence.clusters is not None:
            return f"n = {evidence.n:,} from {evidence.error.groups:,} sources"
        return f"n = {evidence.n:,}"

    @property
    def _correction(self) -> str:
        family, adjusted = self._decision.family, self._decision.adjusted_low
        if adjusted is None:
            return ""
        return f" with Holm's correction for {family} lifts (bound {self._change(adjusted)})"

    @property
    def _indistinct(self) -> str:
        threshold = self._comparison.threshold
        if threshold >= 0:
            least = "no change" if threshold == 0 else f"a change of {self._change(threshold)}{self._unit}"
            return f"that cannot be told from {least}"
        return f"a drop of {self._change(-threshold).lstrip('+')}{self._unit} cannot be told from 0"

    @property
    def _advice(self) -> str:
        """Return the number of documents that could decide, or say that more would not help."""
        evidence, threshold = self._evidence, self._comparison.threshold
        # A guard plans for a candidate that changes nothing: a gain so far is luck as likely as not.
        expected = evidence.mean if self.rule.hoped else min(evidence.mean, 0.0)
        if expected == threshold:
            return "if the change is what it seems, no number of documents would decide"
        if expected < threshold:
            return "if the change is what it seems, more documents would fail it"
        error = (1 - self._confidence) / self._decision.family
        needed = max(evidence.documents(expected, threshold, 1 - error), evidence.n + 1)
        # Three digits: the number rests on the observed change, which is itself uncertain.
        step = 10 ** max(len(str(needed)) - 3, 0)
        return f"about {math.ceil(needed / step) * step:,} documents would do"

    def _change(self, value: float) -> str:
        """Return a change with its sign, in percentage points where scores are fractions."""
        text = f"{100 * value:+.2f}" if self._comparison.fractions else f"{value:+.4g}"
        return "0" if float(text) == 0 else text.replace("-", "−")

    def _bound(self, distance: float) -> str:
        """Return the score at a distance from the threshold, on its good side."""
        sign = 1 if self._comparison.higher_is_better else -1
        return self._score((self._comparison.limit or 0.0) + sign * distance)

    def _score(self, value: float) -> str:
        return f"{100 * value:.2f}" if self._comparison.fractions else f"{value:.4g}"
