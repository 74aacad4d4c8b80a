"""Chances of a gate before anything is loaded, so a hopeless one costs no training.

Assumes right-or-wrong scores, and a share of 10 % or 20 % that differs between two systems, as between a model and its
fine-tuning. Light: reads task files and counts documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Role
from posttrain.data.files import count_rows
from posttrain.gate.roles import RULES
from posttrain.gate.statistics import POWER, normal_quantile, paired_documents, paired_power
from posttrain.scoring.catalogue import EVALUATED, is_path, read_task_file, registered_tasks

if TYPE_CHECKING:
    from posttrain.config.schema import GateConfig, GateTask

DISCORDANCES = (0.1, 0.2)
"""Assumed shares of documents answered right by only one of two systems."""
RIGHT_OR_WRONG = {
    "acc", "acc_norm", "acc_bytes", "exact_match", "em", "pass@1", "pass_at_1", "prompt_level_strict_acc",
    "prompt_level_loose_acc",
}  # fmt: skip
"""lm-eval's metrics with scores of 0 or 1; a task's file lists its own under ``metadata``, as ``right_or_wrong``."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The chances of one task of a gate, or of all its guards together."""

    name: str
    role: Role
    documents: int | None
    """Number of documents to be scored; None when only loading the task would show it."""
    chances: tuple[float, ...] = ()
    """Chances of passing, at each of DISCORDANCES; a limit has one; empty when unknown."""
    needed: int = 0
    """Number of documents for a chance of POWER to pass, at the first of DISCORDANCES."""

    @property
    def hopeless(self) -> bool:
        """True when even the best chance is too small to run the gate."""
        return bool(self.chances) and max(self.chances) < RULES[self.role].hopeless_below


def outlooks(gate: GateConfig, tasks: Mapping[str, GateTask]) -> list[Outlook]:
    """Return the outlook of every task, then that of all guards together."""
    sharing = sum(RULES[task.role].shares_error for task in tasks.values())
    found = [_outlook(gate, name, task, sharing) for name, task in tasks.items()]
    guards = [each for each in found if RULES[each.role].pools]
    if gate.pooled_max_drop is not None and guards and all(each.documents and each.chances for each in guards):
        found.append(_pool([each.documents or 0 for each in guards], gate.pooled_max_drop, gate.confidence))
    elif len(guards) > 1 and all(each.chances for each in guards):
        chances = tuple(math.prod(chance) for chance in zip(*(each.chances for each in guards), strict=True))
        found.append(Outlook(name="all guards", role=Role.guard, documents=None, chances=chances))
    return found


def _outlook(gate: GateConfig, name: str, task: GateTask, sharing: int) -> Outlook:
    settings = _settings(name, task)
    total = _total(task, settings)
    documents = task.limit if total is None else min(total, task.limit or total)
    unknown = Outlook(name=name, role=task.role, documents=documents)
    if task.metric not in _right_or_wrong(settings):
        return unknown
    rule = RULES[task.role]
    if not rule.paired:
        higher = _direction(task, settings)
        return _limit(name, task, documents, gate.confidence, higher_is_better=higher) if documents else unknown
    # Holm's correction demands this confidence of the best of several lifts, and less of the others.
    confidence = 1 - (1 - gate.confidence) / sharing if rule.shares_error else gate.confidence
    effect, threshold = rule.expect(gate, task), rule.least(gate, task)
    chances = [paired_power(documents, share, effect, threshold, confidence) for share in DISCORDANCES if documents]
    return Outlook(
        name=name,
        role=task.role,
        documents=documents,
        chances=tuple(chances),
        needed=paired_documents(DISCORDANCES[0], effect, threshold, confidence) if effect > threshold else 0,
    )


def _limit(name: str, task: GateTask, documents: int, confidence: float, *, higher_is_better: bool) -> Outlook:
    threshold = task.threshold or 0.0
    least = threshold if higher_is_better else 1 - threshold
    hoped = min(least + RULES[task.role].hoped, (1 + least) / 2)
    if not 0 < least < 1:
        return Outlook(name=name, role=task.role, documents=documents)
    spread = math.sqrt(hoped * (1 - hoped))
    distance = (hoped - least) * math.sqrt(documents) / spread - normal_quantile(confidence)
    # With every answer right, the exact lower bound is the n-th root of the error: too few documents never pass.
    possible = (1 - confidence) ** (1 / documents) > least
    chance = NormalDist().cdf(distance) if possible else 0.0
    needed = math.ceil(((normal_quantile(confidence) + normal_quantile(POWER)) * spread / (hoped - least)) ** 2)
    return Outlook(name=name, role=task.role, documents=documents, chances=(chance,), needed=needed)


def _pool(documents: Sequence[int], allowed: float, confidence: float) -> Outlook:
    """Return the outlook of all guards together, with unchanged scores, by the normal approximation."""
    z = normal_quantile(confidence)
    spreads = [math.sqrt(math.fsum(share / n for n in documents)) / len(documents) for share in DISCORDANCES]
    chances = tuple(NormalDist().cdf(allowed / spread - z) for spread in spreads)
    return Outlook(name="pooled guards", role=Role.guard, documents=sum(documents), chances=chances)


def _settings(name: str, task: GateTask) -> Mapping[str, Any]:
    reference = task.task or name
    return read_task_file(Path(reference) if is_path(reference) else registered_tasks()[reference])


def _total(task: GateTask, settings: Mapping[str, Any]) -> int | None:
    """Count the documents of the task's ``data`` file, or of the split scored by lm-eval; None when unknown."""
    if settings.get("process_docs") is not None:
        return None
    if task.data is not None:
        return _count([task.data])
    split = next((settings[key] for key in EVALUATED if settings.get(key)), None)
    arguments = settings.get("dataset_kwargs")
    files = arguments.get("data_files") if isinstance(arguments, Mapping) else None
    if isinstance(files, Mapping):
        files = files.get(split)
    return _count([files] if isinstance(files, str) else files or [])


def _count(files: Sequence[str]) -> int | None:
    paths = [Path(file).expanduser() for file in files]
    counts = [count_rows(path) if path.is_file() else None for path in paths]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _right_or_wrong(settings: Mapping[str, Any]) -> set[str]:
    """Return the metrics with scores known to be 0 or 1."""
    metadata = settings.get("metadata")
    own = metadata.get("right_or_wrong") if isinstance(metadata, Mapping) else None
    return RIGHT_OR_WRONG | set(own if isinstance(own, list) else [])


def _direction(task: GateTask, settings: Mapping[str, Any]) -> bool:
    """Return the direction given by the recipe, else by the task's file, else True: right answers are better."""
    if task.higher_is_better is not None:
        return task.higher_is_better
    entries = settings.get("metric_list")
    listed = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    declared = [entry.get("higher_is_better", True) for entry in listed if entry.get("metric") == task.metric]
    return bool(declared[0]) if declared else True
