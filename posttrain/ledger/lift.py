"""One lift: the paired difference of a task between an artifact and another system."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from posttrain.artifact import BaseWeights
from posttrain.errors import PluginFailed
from posttrain.gate.spec import TaskVerdict, Verdict
from posttrain.saved import TYPE_NAMES


@dataclass(frozen=True, kw_only=True)
class Lift:
    """One row of the ledger, without its place in the chain; the lifts of one verdict are a finding."""

    recorded_at: str
    """UTC with microseconds; no two verdicts of one ledger have the same."""
    recorded_by: str
    run: str
    """Name of the run's directory; ``gates/<gate>-<digest>`` for ``posttrain gate``."""
    recipe: str
    """Name of the recipe, or of the gate for ``posttrain gate``."""
    stage: str
    """Name of the stage, or of the adapter for ``posttrain gate``."""
    lineage: str
    """Kinds of the stages that made the artifact, in order, ``sft>dpo``; else ``adapter`` or ``weights``."""
    base_model: str
    """Base weights, as named in the recipe."""
    base: str
    """Digest of the base weights."""
    parent: str
    """Digest of the artifact's parent, or of the baseline for ``posttrain gate``."""
    artifact: str
    """Digest of the judged artifact."""
    task: str
    metric: str
    filter: str
    higher_is_better: bool
    questions: str
    """Equal for comparable scores; see TaskVerdict."""
    role: str
    against: str
    n: int
    base_score: float
    parent_score: float
    candidate_score: float
    lift: float
    low: float
    high: float
    confidence: float
    threshold: float
    state: str
    """Verdict on this task: pass, fail or undecided."""
    verdict: str
    """Verdict of the whole gate: pass, fail or undecided."""
    unpromoted: str
    """Artifacts below the judged one that no gate passed, each with its verdict; empty when all are promoted."""
    scored_by: str
    """Plugins behind the scores, with their versions."""
    judged_by: str
    """Plugins behind the verdict, with their versions."""
    tried: int = 1
    """Number of candidates among which the judged one was chosen."""

    def __post_init__(self) -> None:
        """Take the value that SQLite gives back for each value; raise ValueError when it cannot hold one."""
        # The row's hash covers what is read back. SQLite has no negative zero, no half of a surrogate pair, and gives
        # an integer back as a float where a float belongs.
        own: dict[str, Any] = vars(self)
        for name, kind in KINDS.items():
            value = own[name]
            found = type(value)
            if found is not kind:
                raise ValueError(f"{name} is {value!r}, not {TYPE_NAMES[kind]}")
            if kind is str:
                if not value.isascii():
                    own[name] = value.encode("utf-8", "backslashreplace").decode("utf-8")
            elif kind is float:
                if not math.isfinite(value):
                    raise ValueError(f"{name} is {value!r}, not {TYPE_NAMES[kind]}")
                own[name] = value or 0.0
            elif kind is int and abs(value) > LARGEST:
                raise ValueError(f"{name} is {value}, beyond {LARGEST}")


KINDS: dict[str, type] = {
    field.name: {"str": str, "int": int, "float": float, "bool": bool}[str(field.type)] for field in fields(Lift)
}
"""Type of every field of a Lift."""
LARGEST = 2**63 - 1
"""Largest integer of SQLite."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict about an artifact, to be recorded."""

    run: str
    recipe: str
    stage: str
    lineage: tuple[str, ...]
    base: BaseWeights
    parent: str
    """Digest of what the artifact was made from, or is compared with."""
    artifact: str
    """Digest of the artifact."""
    verdict: Verdict
    tried: int = 1
    """Number of candidates among which it was chosen."""

    def lifts(self, recorded_at: str, recorded_by: str) -> list[Lift]:
        """Return its lifts; raise PluginFailed when a plugin's verdict holds a value of a wrong type."""
        shared: dict[str, Any] = {
            "recorded_at": recorded_at, "recorded_by": recorded_by, "run": self.run, "recipe": self.recipe,
            "stage": self.stage, "lineage": ">".join(self.lineage), "base_model": self.base.name,
            "base": self.base.digest, "parent": self.parent, "artifact": self.artifact,
            "verdict": self.verdict.state, "unpromoted": "; ".join(self.verdict.unpromoted),
            "scored_by": ", ".join(self.verdict.scored_by), "judged_by": ", ".join(self.verdict.judged_by),
            "tried": self.tried,
        }  # fmt: skip
        try:
            return [Lift(**shared, **_figures(task)) for task in self.verdict.tasks]
        except (ValueError, TypeError, OverflowError) as error:
            raise PluginFailed(f"the verdict about {self.stage} cannot be recorded: {error}") from None


def lift_from_json(value: Any) -> Lift:
    """Return the lift in a JSON value; raise ValueError when the fields are not exactly those of a lift.

    ``tried`` may be absent: it is 1.
    """
    if not isinstance(value, dict) or {*value, "tried"} != set(KINDS):
        raise ValueError("it does not have the fields of a lift")
    return Lift(**value)


def same_finding(first: Sequence[Lift], second: Sequence[Lift]) -> bool:
    """Tell whether two findings are equal, apart from when and by whom they were recorded."""
    return [_content(lift) for lift in first] == [_content(lift) for lift in second]


def _content(lift: Lift) -> dict[str, Any]:
    return {key: value for key, value in asdict(lift).items() if key not in ("recorded_at", "recorded_by")}


def _figures(task: TaskVerdict) -> dict[str, Any]:
    """Return the fields taken from a task's verdict."""
    numbers = {
        "base_score": task.base, "parent_score": task.parent, "candidate_score": task.candidate, "lift": task.lift,
        "low": task.low, "high": task.high, "confidence": task.confidence, "threshold": task.threshold,
    }  # fmt: skip
    named = ("task", "metric", "filter", "higher_is_better", "questions", "role", "against", "n", "state")
    return {name: getattr(task, name) for name in named} | {key: float(value) for key, value in numbers.items()}
