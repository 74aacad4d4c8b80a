"""The gate of an on-policy stage while it is trained: a sample of its documents, asked of the policy as it is.

Nothing is trained on these answers and nothing is chosen by them: the verdict on the published artifact alone decides.
"""

# D = documents of the sample, those of all tasks one after another

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Protocol

import torch

from posttrain.config.schema import Role
from posttrain.engine import processes
from posttrain.engine.attention import causal_model
from posttrain.engine.checkpoint import State
from posttrain.engine.engine import Engine
from posttrain.engine.precision import autocasting
from posttrain.errors import BadInput
from posttrain.gate.spec import FOLLOWED
from posttrain.sampling.policy import writing
from posttrain.stage import Progress

FIRST = "evaluation/gate_first"
"""Name in checkpoints of the scores before training."""


@dataclass(frozen=True, kw_only=True)
class SampledTask:
    """A task of the gate, as far as it is followed."""

    name: str
    metric: str
    role: Role
    higher_is_better: bool
    documents: int
    """Documents of the sample."""


class GateSample(Protocol):
    """A fixed sample of the documents of a gate's tasks."""

    @property
    def tasks(self) -> Sequence[SampledTask]:
        """The followed tasks."""

    def ask(self, model: Any, place: tuple[int, int], report: Callable[[int, int], None]) -> Sequence[float]:
        """Return the scores of all documents, task after task, as the gate takes them; 0 for those of other processes.

        ``place`` is the number of the process and that of all processes; ``report`` gets the number of documents done
        and their total. Model and random numbers stay as they are. Raises BadInput where a task's own functions fail,
        ArtifactDamaged for an output that is not finite.
        """


@dataclass(kw_only=True)
class GateCourse:
    """The scores of a gate's sample in the course of a training; without a sample, none."""

    sample: GateSample | None
    progress: Progress
    _first: torch.Tensor | None = field(default=None, init=False)
    """Scores before training, [D]."""
    _last: torch.Tensor | None = field(default=None, init=False)

    @property
    def is_followed(self) -> bool:
        """True while there are documents to ask."""
        return self.sample is not None and bool(self.sample.tasks)

    def measure(self, step: int, engine: Engine, dtype: str) -> dict[str, float]:
        """Return and show the mean score of each task by the engine's model as it is after ``step``.

        A gate that cannot be asked is no longer followed: a note has the reason, and training continues. Raises
        ArtifactDamaged for an output that is not finite.
        """
        if self.sample is None or not self.is_followed:
            return {}
        model, fault = engine.model, "another process could not ask it"
        count = sum(task.documents for task in self.sample.tasks)
        # whole weights: documents are of different lengths, so that processes ask the model differently often
        with engine.whole(), writing(causal_model(model)), autocasting(model, dtype):
            try:
                place, report = (processes.rank(), processes.world()), self._report
                scores_D = torch.tensor(self.sample.ask(model, place, report), dtype=torch.float64)
            except (BadInput, torch.OutOfMemoryError) as error:
                scores_D, fault = torch.full((count,), nan, dtype=torch.float64), str(error)
        scores_D = processes.total(scores_D)
        if not torch.isfinite(scores_D).all():
            self.sample = self._first = self._last = None
            self.progress.note(f"warning: the gate is not followed any more: {fault}")
            return {}
        self._last = scores_D
        self._first = scores_D if self._first is None else self._first
        found = {task.name: mean for task, mean in self._means(scores_D)}
        shown = ", ".join(f"{name} {mean:.3f}" for name, mean in found.items())
        self.progress.note(f"gate, a sample after step {step}: {shown}")
        return {f"{FOLLOWED}{name}": mean for name, mean in found.items()}

    def figures(self) -> dict[str, Any]:
        """Return metric, role, number of documents, and the scores before and after training of each task."""
        if self._first is None or self._last is None:
            return {}
        found: dict[str, Any] = {}
        for (task, first), (_, last) in zip(self._means(self._first), self._means(self._last), strict=True):
            found[task.name] = {
                "metric": task.metric, "role": task.role.value, "documents": task.documents, "first": first,
                "last": last,
            }  # fmt: skip
        return {"gate_sample": found}

    def left_behind(self, first: float, last: float) -> list[str]:
        """Return a warning for each lift that did not rise while the sampled reward did, from ``first`` to ``last``."""
        if self._first is None or self._last is None:
            return []
        found = []
        for (task, before), (_, after) in zip(self._means(self._first), self._means(self._last), strict=True):
            gained = after > before if task.higher_is_better else after < before
            perfect = task.higher_is_better and before == 1
            if task.role is Role.lift and not gained and not perfect:
                what = f"the sampled reward rose from {first:.3f} to {last:.3f}, and the gate did not follow"
                scores = f"{task.name}, {task.metric}: {before:.3f}, then {after:.3f} on {task.documents:,} documents"
                fix = "the model may learn the reward alone. Read the answers with the highest rewards in answers/"
                found.append(f"{what} ({scores}): {fix}")
        return found

    def state(self) -> State:
        """Return the scores before training, to keep in a checkpoint."""
        return {} if self._first is None else {FIRST: self._first.clone()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the scores of ``state``; those of another gate's documents are left out."""
        tasks = () if self.sample is None else self.sample.tasks
        if FIRST in state and len(state[FIRST]) == sum(task.documents for task in tasks):
            self._first = state[FIRST]

    def _means(self, scores_D: torch.Tensor) -> Iterator[tuple[SampledTask, float]]:
        tasks = () if self.sample is None else self.sample.tasks
        for task, part in zip(tasks, scores_D.split([task.documents for task in tasks]), strict=True):
            yield task, float(part.mean())

    def _report(self, done: int, total: int) -> None:
        self.progress.part(done, total, "gate document")
