"""The contract of a gate: request and scorecard in, verdict out. Imports neither torch nor lm_eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from posttrain.gate.sequential import Look

if TYPE_CHECKING:
    from posttrain.artifact import ModelSource
    from posttrain.config.schema import GateConfig, GateTask

VerdictState = Literal["pass", "fail", "undecided"]
"""The decision of a gate, in one word."""
Comparator = Literal["base", "parent", "baseline", "threshold"]
"""The other side of a comparison: a system, or the threshold of a limit."""
FOLLOWED = "eval_gate_"
"""Beginning of the metrics of a gate that is followed while answers are sampled; the name of a task comes after it."""


def worst(states: Iterable[VerdictState]) -> VerdictState:
    """Return the worst of several answers: all have to pass, and none at all is no pass."""
    found = set(states)
    return "fail" if "fail" in found else "undecided" if "undecided" in found or not found else "pass"


class GateProgress(Protocol):
    """Receiver of a gate's progress."""

    def note(self, text: str) -> None:
        """Show one line to the user."""

    def advance(self, system: str, task: str, done: int, total: int, tokens: int = 0) -> None:
        """Report that ``system`` has answered ``done`` of the ``total`` documents of ``task``.

        ``tokens`` counts the tokens read or written for the next documents, in batches that take long.
        """


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The documents of a gate's task that training has seen."""

    task: str
    """Name of the task in the gate."""
    documents: int
    """Documents of the task."""
    trained: int
    """Documents that a row which was trained holds: at least, where several stages hold some."""

    @property
    def text(self) -> str:
        """The counts in words."""
        return f"{self.trained:,} of {self.documents:,} documents trained on"


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """One gate to be run."""

    stage: str
    """Name of the stage whose artifact is judged."""
    gate: GateConfig
    """Settings of the gate."""
    tasks: Mapping[str, GateTask]
    """The gate's tasks, typed and checked, by their name in the gate."""
    systems: Mapping[str, ModelSource]
    """``base``, ``candidate``, and ``parent`` when the parent is not the base; ``baseline`` in ``posttrain gate``."""
    dtype: str
    """Number format of the weights: ``float32`` or ``bfloat16``."""
    cache: Path
    """Folder of scores cached by content, shared by all runs below one output root."""
    scorecard: Path
    """The scorecard.jsonl to write: one row per system, task, filter and document."""
    unpromoted: tuple[str, ...] = ()
    """Artifacts below the candidate that no gate passed, each with its verdict."""
    trained_on: tuple[TrainedOn, ...] = ()
    """Tasks of which the rows of the candidate, or of a stage below it, hold documents."""
    compute_dtype: str | None = None
    """Number format of the arithmetic; None for that of the weights, or on a CPU for the faster one, as measured."""
    launch: Callable[..., None] | None = None
    """Start of the processes that answer in place of this one, the core's own affair; None asks here."""


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """One answer of one system, under one filter of one task."""

    system: str
    """``base``, ``parent``, ``baseline`` or ``candidate``."""
    digest: str
    """Content digest of the system."""
    task: str
    """Name of the task in the gate."""
    filter: str
    """Filter of the task."""
    doc_id: int
    """Position in the task's documents; in a group, in the documents of its tasks one after the other."""
    document_hash: str
    """SHA-256 over the document."""
    request_hash: str
    """SHA-256 over every request of the document: rendered prompts, choices and generation settings."""
    target_hash: str
    """SHA-256 over the target."""
    metrics: Mapping[str, float]
    """Score per metric of the task, for the metrics that are means over documents."""
    response: str
    """The model's answer, or the choice that it preferred."""
    target: str
    """The right answer, as the task states it."""


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """Every score of one gate."""

    rows: tuple[DocumentScore, ...]
    """One row per system, task, filter and document."""
    higher_is_better: Mapping[str, bool]
    """Direction of each task's metric, by the task's name in the gate."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 over how each task asks and scores, by the task's name in the gate."""
    documents: Mapping[str, int] = field(default_factory=dict)
    """Number of documents of each task, scored or not yet; a scorecard with fewer is rejected."""
    clusters: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """The source of every document, scored or not yet, for the tasks whose documents share sources or questions."""
    slices: Mapping[str, Mapping[str, Mapping[str, tuple[int, ...]]]] = field(default_factory=dict)
    """Documents of each value of each field of a task's slices."""
    look: Look = Look()
    """The look of a sequential gate at these scores."""


@dataclass(frozen=True, kw_only=True)
class SliceVerdict:
    """The documents of one value of a field, in one comparison. It explains, and decides nothing."""

    field: str
    """Field of the documents, or ``task`` for the tasks of a group."""
    value: str
    """Value of the field."""
    n: int
    """Number of compared documents."""
    better: int
    """Documents that the candidate answers better than the other system, or than a limit asks for."""
    worse: int
    """Documents that it answers worse."""
    lift: float
    """Oriented mean difference."""
    low: float
    """Lower bound of the lift; the bounds of all slices of a comparison hold together."""
    high: float
    """Upper bound of the lift."""


@dataclass(frozen=True, kw_only=True)
class TaskVerdict:
    """One task compared with one system, or with a threshold; or all guards together.

    Scores are means over documents. The lift is oriented: more is better; a limit's is the distance from its threshold.
    """

    task: str
    """Name of the task in the gate."""
    metric: str
    """Compared metric."""
    filter: str
    """Filter of the task."""
    higher_is_better: bool
    """Direction of the scores; where it is False, the lift and its bounds are turned around."""
    questions: str
    """SHA-256 over metric, filter and documents: scores with equal ones are comparable."""
    role: str
    """``lift``, ``guard`` or ``limit``."""
    against: Comparator
    """The other side of the comparison."""
    n: int
    """Number of compared documents; equal ones count once."""
    base: float
    """Score of the base."""
    parent: float
    """Score of the parent, or of the baseline."""
    candidate: float
    """Score of the candidate."""
    lift: float
    """Oriented mean difference."""
    low: float
    """Lower bound of the lift."""
    high: float
    """Upper bound of the lift."""
    confidence: float
    """One-sided confidence of either bound."""
    threshold: float
    """Value for the lower bound to exceed."""
    state: VerdictState
    """Decision about this task."""
    reason: str
    """The deciding figures in plain words."""
    method: str = ""
    """Name of the interval behind the bounds."""
    adjusted_low: float | None = None
    """Lower bound with Holm's correction: it decides among several lifts. None for one alone."""
    bootstrap_low: float | None = None
    """Bootstrap lower bound, for scores that are not 0 or 1. Reported only."""
    bootstrap_high: float | None = None
    """Upper bound of the same interval."""
    slices: tuple[SliceVerdict, ...] = ()
    """Slices of the documents, field by field, where the task names fields or is a group."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision of a gate about an artifact."""

    state: VerdictState
    """The decision."""
    gated: bool
    """False when the recipe switched the gate off."""
    tasks: tuple[TaskVerdict, ...]
    """Decisions about the single tasks."""
    reason: str
    """The deciding figures in plain words."""
    unpromoted: tuple[str, ...] = ()
    """Artifacts below the judged one that no gate passed, each with its verdict. Filled in."""
    trained_on: tuple[TrainedOn, ...] = ()
    """Tasks of which trained rows hold documents: that decides nothing, but their lift is in part recall. Filled in."""
    notes: tuple[str, ...] = ()
    """Remarks about what the decision is worth; each is shown wherever the verdict is."""
    scored_by: tuple[str, ...] = ()
    """Plugins that scored, with their versions: the one that answered, then those that wrapped it. Filled in."""
    judged_by: tuple[str, ...] = ()
    """The same for the decision. Filled in."""

    def recall(self, task: str) -> str:
        """Return in words how much of a task's documents was trained on; empty for none."""
        return next((each.text for each in self.trained_on if each.task == task), "")
