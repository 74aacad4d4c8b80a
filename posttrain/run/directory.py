"""The directory of a run: one writer, its state for scripts, its metrics."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf

from posttrain.disk import replace_text
from posttrain.errors import Problem, RunLocked
from posttrain.host import activity
from posttrain.plan import Plan


@dataclass(kw_only=True)
class StageState:
    """Where one stage stands; what scripts read."""

    name: str
    kind: str
    state: str = "pending"
    """pending, running, trained, promoted, gate_failed, undecided; interrupted or failed in training."""
    artifact: str | None = None
    """Directory of the artifact, relative to the run's."""
    digest: str | None = None
    parent_digest: str | None = None
    verdict: str | None = None
    """pass, fail or undecided; the whole verdict is in stages/<name>/verdict.json."""
    tokens: int | None = None
    """Tokens seen in training."""
    seconds: float | None = None
    """Time spent training and evaluating, over all attempts."""
    eval_loss: float | None = None
    """Loss of the records of eval_data or eval_share at the end, when there are any."""
    warnings: list[str] = field(default_factory=list)
    """What the stage found unusual without stopping."""


@dataclass(kw_only=True)
class RunState:
    """Content of run.json."""

    recipe: str
    command: list[str] = field(default_factory=list)
    """The command that was last given to run or continue it, in words."""
    started: str | None = None
    """When it was first started, in UTC."""
    state: str = "running"
    """running, done, gate_failed, undecided, interrupted or failed."""
    stages: list[StageState] = field(default_factory=list)

    def end(self, state: str) -> None:
        """The run ends as ``state``, and with it the stage that was being trained."""
        self.state = state
        for stage in self.stages:
            if stage.state == "running":
                stage.state = state

    def stage(self, name: str) -> StageState:
        """The state of one stage."""
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory while this process is its only writer."""

    path: Path
    state: RunState

    def stage(self, name: str) -> Path:
        """Folder of one stage."""
        folder = self.path / "stages" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save(self) -> None:
        """Write run.json in one step."""
        replace_text(self.path / "run.json", json.dumps(asdict(self.state), indent=2) + "\n")


@contextlib.contextmanager
def open_run(path: Path, plan: Plan) -> Iterator[RunDirectory]:
    """Create or continue the run of a plan in ``path``.

    Raises RunLocked at once, naming the holder, when another process writes it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a+") as lock:
        _lock(lock, path)
        replace_text(path / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(plan.resolved))))
        run = RunDirectory(path, _state(path, plan))
        run.save()
        with activity.running(path, plan.plugin_timeout):
            yield run


def end(path: Path, state: str) -> None:
    """Write down how the run in ``path`` ended, in place of a writer that died before it could.

    Raises RunLocked when another process goes on with it; OSError, ValueError or TypeError when run.json cannot be read
    or written.
    """
    with (path / ".lock").open("a+") as lock:
        _lock(lock, path)
        run = RunDirectory(path, read_state(path))
        if run.state.state == "running":
            run.state.end(state)
            run.save()


def read_state(path: Path) -> RunState:
    """The state in a run.json."""
    raw = json.loads((path / "run.json").read_text())
    return RunState(**{**raw, "stages": [StageState(**stage) for stage in raw["stages"]]})


def _state(path: Path, plan: Plan) -> RunState:
    """The state of a run that begins or goes on: stages that it has been through keep theirs."""
    former = read_state(path) if (path / "run.json").exists() else RunState(recipe=plan.recipe, started=_now())
    former.end("interrupted")  # its writer, if there was one, is gone
    known = {stage.name: stage for stage in former.stages}
    stages = [known.get(step.name, StageState(name=step.name, kind=step.stage.name)) for step in plan.steps]
    return RunState(recipe=plan.recipe, command=["posttrain", *plan.words], started=former.started, stages=stages)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lock(lock: IO[str], path: Path) -> None:
    """Hold an advisory lock for as long as the file is open: the kernel frees it however the process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        problem = Problem(
            where=str(path), what=f"{holder} writes this run", fix="Wait for it to end, or set output_root=OTHER"
        )
        raise RunLocked(problem) from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, started {_now()},\n")
    lock.flush()
