"""One stage of one run: its folder, the digests naming its result, its time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain.artifact import ModelSource
from posttrain.config.schema import WITHOUT_EFFECT
from posttrain.data.reading import data_digest
from posttrain.digests import digest_of
from posttrain.gate.procedure import HOOKS
from posttrain.host.plugins import Host
from posttrain.plan import Plan, Step
from posttrain.run.directory import RunDirectory, StageState
from posttrain.run.display import Display
from posttrain.run.interrupts import Interrupts
from posttrain.saved import plain
from posttrain.scoring.code import task_digests

PACKAGES = (
    "posttrain", "torch", "transformers", "tokenizers", "peft", "accelerate", "bitsandbytes", "lm_eval",
)  # fmt: skip
"""Distributions recorded with their versions in every artifact."""
SCORING_ONLY = ("lm_eval",)
"""Those that cannot change an artifact, only its scores."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step of the plan, bound to its run."""

    plan: Plan
    step: Step
    host: Host
    run: RunDirectory
    base: ModelSource
    data_digest: str
    display: Display
    interrupts: Interrupts

    @property
    def name(self) -> str:
        """Name of the stage's node in the recipe."""
        return self.step.name

    @property
    def entry(self) -> StageState:
        """The stage's entry in run.json."""
        return self.run.state.stage(self.name)

    @property
    def folder(self) -> Path:
        """The stage's folder in the run's directory."""
        return self.run.stage(self.name)

    @property
    def is_last(self) -> bool:
        """True for the last stage of the plan."""
        return self.name == self.plan.steps[-1].name

    def fingerprint(self, parent: ModelSource, kept: str = "") -> str:
        """Return the digest of everything the result depends on: settings, parent, data, seed, number format, code.

        ``kept`` names the rows that preparation kept: by them, gates and filters have their part in the result.
        """
        content = {"step": step_identity(self.step, self.plan), "parent": parent.digest, "data": self.data_digest}
        content |= {"kept": kept} if kept else {}
        shapers = self.host.shapers()
        return digest_of({**content, "plugins": shapers} if shapers else content)

    def gate_digest(self, systems: Mapping[str, ModelSource], unpromoted: Sequence[str]) -> str:
        """Return the digest of everything the verdict depends on: the gate, its tasks' files, the systems, the code."""
        return digest_of(
            {
                "gate": plain(self.step.gate),
                "files": {name: task_digests(task.task or name, task.data) for name, task in self.step.tasks.items()},
                "systems": {role: system.digest for role, system in systems.items()},
                "unpromoted": list(unpromoted),
                "plugins": self.host.answerers(*HOOKS),
                "versions": versions(),
            }
        )

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time spent inside to the stage's seconds."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.entry.seconds = round((self.entry.seconds or 0.0) + time.monotonic() - started, 1)
            self.run.save()


def records_digest(step: Step) -> str:
    """Return the digest of a stage's training data, and of its eval data if it has any."""
    trained = data_digest(step.sources, step.cache)
    return digest_of([trained, data_digest(step.eval_sources, step.cache)]) if step.eval_sources else trained


def step_identity(step: Step, plan: Plan) -> dict[str, Any]:
    """Return everything a stage's training depends on, except its parent and its data.

    Its gate, its name and its place in the recipe have no part in it, nor has the machine: neither threads nor device.
    A setting that changes no number has none either.
    """
    settings = {key: value for key, value in plain(step.config).items() if key not in WITHOUT_EFFECT}
    identity = {"settings": settings, "seed": step.seed, "dtype": plan.model.dtype.value, "code": step.origin}
    identity["versions"] = {name: found for name, found in versions().items() if name not in SCORING_ONLY}
    identity |= {"rewards": dict(step.rewards)} if step.rewards else {}
    return identity | shaping_settings(plan)


def shaping_settings(plan: Plan) -> dict[str, Any]:
    """Return the plugins' settings with an effect on artifacts, under one key; empty when there are none."""
    found = {name: plain(plan.settings[name]) for name in plan.shaping}
    return {"plugin_settings": found} if found else {}


def versions() -> dict[str, str]:
    """Return the versions of PACKAGES, as far as they are installed."""
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


@cache
def _version(package: str) -> str | None:
    """Return the version with which this process began: it is read from a file of the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
