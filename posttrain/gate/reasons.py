"""The reason of a comparison's state in plain words, and what leaves a gate without force."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from posttrain.config.schema import Half, Role
from posttrain.gate.evidence import Mean
from posttrain.gate.roles import RULES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from posttrain.config.schema import GateConfig, GateTask
    from posttrain.gate.comparison import Comparison, Decision
    from posttrain.gate.evidence import Evidence

LEAST_CONFIDENCE = 0.8
"""Confidence below which a gate is named as one that luck passes."""
LARGE_DROP = 0.5
"""Allowed loss of a score between 0 and 1 that is named as hardly a demand."""


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
        copies = self._comparison.documents - evidence.n
        size = f"n = {evidence.n:,}"
        if isinstance(evidence, Mean) and evidence.clusters is not None:
            size += f" from {evidence.error.groups:,} sources"
        return f"{size} [{self._comparison.documents:,} documents, {evidence.n:,} distinct]" if copies else size

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


def copies(comparison: Comparison) -> str | None:
    """Return the note that documents of a task are equal; None when each is distinct."""
    distinct = 0 if comparison.evidence is None else comparison.evidence.n
    if comparison.documents <= distinct:
        return None
    return f"{comparison.name}: {comparison.documents:,} documents, {distinct:,} distinct: equal ones count once"


def of_choice(gate: GateConfig) -> list[str]:
    """Return what the choice of a candidate among several means for a verdict; nothing for one alone."""
    if gate.half is Half.choosing:
        return ["asked on the half of the documents for choosing: it promotes nothing"]
    if gate.chosen_from == 1:
        return []
    if gate.half is Half.judging:
        return [f"chosen from {gate.chosen_from:,} on the other half of the documents, and judged on this one"]
    luck = f"luck alone passes up to {1 - gate.confidence**gate.chosen_from:.0%} of what is not better"
    return [f"chosen from {gate.chosen_from:,}, and judged on all documents: if they had a part in the choice, {luck}"]


def weaknesses(gate: GateConfig, tasks: Mapping[str, GateTask]) -> list[str]:
    """Return what makes a gate unable to fail an artifact, as far as its settings show."""
    if not gate.enabled:
        return ["the gate is switched off: nothing is asked, and everything passes"]
    found = [] if tasks else ["no task is asked"]
    if gate.confidence < LEAST_CONFIDENCE:
        luck = f"luck alone passes up to {1 - gate.confidence:.0%} of what is not better"
        found.append(f"confidence {gate.confidence:g} is low: {luck}")
    if gate.pooled_max_drop is not None and gate.pooled_max_drop >= LARGE_DROP:
        found.append(f"pooled_max_drop {gate.pooled_max_drop:g} allows to lose most of a score between 0 and 1")
    return found + [f"{name}: {weak}" for name, task in tasks.items() if (weak := _weakness(gate, task))]


def _weakness(gate: GateConfig, task: GateTask) -> str | None:
    """Return why hardly an artifact can fail a task."""
    drop, limit, higher = gate.allowed_drop(task), task.threshold, task.higher_is_better
    if task.role is Role.lift and task.min_lift < 0:
        return f"min_lift {task.min_lift:g} is below 0: a loss passes as a lift"
    if task.role is Role.guard and drop >= LARGE_DROP:
        return f"max_drop {drop:g} allows to lose {'all' if drop >= 1 else 'most'} of a score between 0 and 1"
    if task.role is not Role.limit or limit is None:
        return None
    if higher is not False and (limit < 0 or (limit == 0 and higher)):
        return f"threshold {limit:g}: no score that is a share or a count lies below"
    if higher is False and limit >= 1:
        return f"threshold {limit:g}: no score between 0 and 1 lies above"
    return None


def idle(comparison: Comparison) -> str | None:
    """Return why no candidate can fail a comparison, from what the others scored; None when one can."""
    if not comparison.fractions:
        return None
    if comparison.limit is not None:
        met = comparison.limit < 0 if comparison.higher_is_better else comparison.limit > 1
        return f"{comparison.name}: every score meets the threshold {comparison.limit:g}" if met else None
    allowed, old = -comparison.threshold, comparison.means.get(comparison.against, 0.0)
    room = old if comparison.higher_is_better else 1 - old
    if allowed <= 0 or allowed < room:
        return None
    asked = f"{comparison.name} against {comparison.against} cannot fail"
    return f"{asked}: it may lose {100 * allowed:.4g} points, and has {100 * room:.4g} to lose"
