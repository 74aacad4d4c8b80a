"""What a gate is asked and what it answers. Nothing here imports torch or lm_eval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from posttrain.gate.sequential import Look

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource
    from posttrain.config.schema import GateConfig, GateTask

VerdictState = Literal["pass", "fail", "undecided"]
Comparator = Literal["base", "parent", "threshold"]
"""What the candidate is compared with; a limit compares it with a threshold."""


def worst(states: Iterable[VerdictState]) -> VerdictState:
    """What several answers come to: all have to pass, and none at all is no pass."""
    found = set(states)
    return "fail" if "fail" in found else "undecided" if "undecided" in found or not found else "pass"


class GateProgress(Protocol):
    """Where a gate reports while it scores."""

    def note(self, text: str) -> None:
        """Show one line to the user."""

    def advance(self, system: str, task: str, done: int, total: int) -> None:
        """Report that ``system`` has answered ``done`` of the ``total`` documents of ``task``."""


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """One gate to be run."""

    stage: str
    """Name of the stage whose artifact is judged."""
    gate: GateConfig
    tasks: Mapping[str, GateTask]
    """The gate's tasks, typed and checked, by the name they have in the gate."""
    systems: Mapping[str, ModelSource]
    """``base``, ``candidate``, and ``parent`` when the parent is not the base."""
    dtype: str
    """``float32`` or ``bfloat16``."""
    cache: Path
    """Folder of scores cached by content, shared by all runs below one output root."""
    scorecard: Path
    """The scorecard.jsonl to write: one row per system, task, filter and document."""


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """One document as one system answered it, under one filter of one task."""

    system: str
    """``base``, ``parent`` or ``candidate``."""
    digest: str
    """Content digest of the system."""
    task: str
    """Name of the task in the gate."""
    filter: str
    doc_id: int
    """Position in the task's documents; in a group, in the documents of its tasks one after the other."""
    document_hash: str
    request_hash: str
    """SHA-256 over every request of the document: rendered prompts, choices and generation settings."""
    target_hash: str
    metrics: Mapping[str, float]
    """Score per metric of the task, for the metrics that are means over documents."""
    response: str
    """What the model answered, or the choice it preferred."""
    target: str


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """Every score of one gate."""

    rows: tuple[DocumentScore, ...]
    higher_is_better: Mapping[str, bool]
    """Direction of each task's metric, by the task's name in the gate."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 over how each task asks and scores, by the task's name in the gate."""
    documents: Mapping[str, int] = field(default_factory=dict)
    """How many documents each task has, scored or not yet; a scorecard that holds fewer is refused."""
    clusters: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """The source of every document, for the tasks whose documents share sources."""
    look: Look = Look()
    """Which look of a sequential gate the scores are for."""


@dataclass(frozen=True, kw_only=True)
class TaskVerdict:
    """One task compared with one system, or with a threshold; or all guards together.

    Scores are means over documents. The lift is oriented: more is better; a limit's is the distance from its threshold.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    """Whether more is better in the scores; the lift and its bounds are turned around where it is not."""
    questions: str
    """SHA-256 over metric, filter and documents: scores with equal ones are comparable."""
    role: str
    against: Comparator
    n: int
    base: float
    parent: float
    candidate: float
    lift: float
    low: float
    high: float
    confidence: float
    """One-sided confidence of either bound."""
    threshold: float
    """What the lower bound has to exceed."""
    state: VerdictState
    reason: str
    """What decided, in words a person understands."""
    method: str = ""
    """How the bounds are found."""
    adjusted_low: float | None = None
    """The lower bound with Holm's correction, which decides among several lifts; None for one alone."""
    bootstrap_low: float | None = None
    """The lower bound by the bootstrap, beside that of scores that are not only right or wrong; it does not decide."""
    bootstrap_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a gate says about an artifact."""

    state: VerdictState
    gated: bool
    """False when the recipe switched the gate off."""
    tasks: tuple[TaskVerdict, ...]
    reason: str
