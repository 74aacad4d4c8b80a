"""The directory of a run: its single writer, its lock, its state in run.json."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf

from posttrain.artifact import MANIFEST, Manifest, ModelSource, read_manifest
from posttrain.chat_template import DATE
from posttrain.config.schema import OnFail
from posttrain.disk import lock, replace_text
from posttrain.errors import Problem, RunLocked
from posttrain.gate.procedure import STATES, WARNED, policy_for, state_of
from posttrain.host import activity
from posttrain.plan import Plan
from posttrain.quoting import redacted
from posttrain.run.verdict import SCORECARD, VERDICT, KeptVerdict, confirmed_verdict
from posttrain.saved import as_kind, read_as

INTERRUPTED = "interrupted"
UNFINISHED = ("running", INTERRUPTED, "failed")
"""States of a stage and of a run that no artifact and no verdict tells."""
LOOK_SECONDS = 0.05
"""Time after which whoever only looked whether a run has a writer has let go of its lock."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt to find the share of replayed tokens at which a stage's guards hold."""

    share: float
    """Share of the stage's tokens."""
    held: bool
    """True when every guard passed on the documents that choose."""
    reason: str = ""
    """The figures of the guards that did not."""

    def line(self) -> str:
        """Return the attempt in one line."""
        found = "the guards hold" if self.held else f"the guards do not hold: {self.reason}"
        return f"{self.share:.1%} of the tokens replayed: {found}"


@dataclass(kw_only=True)
class StageState:
    """State of one stage in run.json, for scripts."""

    name: str
    kind: str
    state: str = "pending"
    """pending, running, trained, promoted, gate_failed, undecided; unpromoted: passed, but below it is something that
    did not; interrupted or failed in training."""
    artifact: str | None = None
    """Directory of the artifact, relative to the run's directory."""
    digest: str | None = None
    origin: str | None = None
    """Directory below the output root from which the artifact was linked; None when this run trained it."""
    parent_digest: str | None = None
    verdict: str | None = None
    """pass, fail or undecided; the whole verdict is in stages/<name>/verdict.json."""
    unpromoted: list[str] = field(default_factory=list)
    """Artifacts below this one that no gate passed, each with its verdict."""
    tokens: int | None = None
    """Number of tokens seen in training."""
    seconds: float | None = None
    """Time of training and evaluation over all attempts."""
    eval_loss: float | None = None
    """Final loss on the records of eval_data or eval_share; None without any."""
    warnings: list[str] = field(default_factory=list)
    """Problems reported by the stage without stopping."""
    attempts: list[Attempt] = field(default_factory=list)
    """Shares of replayed tokens that were tried, for ``replay.auto``; the last one is that of the artifact."""

    def reset(self) -> None:
        """Forget all but the time spent, and the origin of what may still lie there: the stage is yet to run."""
        fresh = StageState(
            name=self.name, kind=self.kind, seconds=self.seconds, origin=self.origin, attempts=self.attempts
        )
        vars(self).update(vars(fresh))


@dataclass(kw_only=True)
class RunState:
    """Content of run.json: for scripts and people. Manifests and verdicts have the truth about artifacts."""

    recipe: str
    command: list[str] = field(default_factory=list)
    """Words of the newest command to run or resume it."""
    started: str | None = None
    """Time of the first start, in UTC."""
    date: str | None = None
    """Day that the chat template prints, pinned by the first start; None when it prints none."""
    state: str = "running"
    """running, done, warned (complete, after a verdict that was no pass), gate_failed, undecided, interrupted or
    failed."""
    stages: list[StageState] = field(default_factory=list)

    def end(self, state: str) -> None:
        """End the run as ``state``, and the stage in training with it."""
        self.state = state
        for stage in self.stages:
            if stage.state == "running":
                stage.state = state

    def stage(self, name: str) -> StageState:
        """Return the state of one stage."""
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory while this process is its only writer."""

    path: Path
    state: RunState

    def stage(self, name: str) -> Path:
        """Return the folder of one stage; create it if needed."""
        folder = self.path / "stages" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def pin_day(self, base: ModelSource) -> ModelSource:
        """Return the base with the day that its template prints: that of the run's first start, for every later one."""
        dated = base.dated(self.state.date)
        self.state.date = dated.template_variables.get(DATE)
        self.save()
        return dated

    def save(self) -> None:
        """Write run.json in one step."""
        replace_text(self.path / "run.json", redacted(json.dumps(asdict(self.state), indent=2)) + "\n")


@contextlib.contextmanager
def open_run(path: Path, plan: Plan) -> Iterator[RunDirectory]:
    """Create or resume the run of a plan in ``path``.

    Raises RunLocked at once, naming the holder, when another process writes it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a+") as held:
        _lock(held, path)  # before the first write: a second process must not change the first one's recipe or state
        replace_text(path / "recipe.yaml", redacted(OmegaConf.to_yaml(OmegaConf.create(dict(plan.resolved)))))
        run = RunDirectory(path, _state(path, plan))
        run.save()
        with activity.running(path, plan.plugin_timeout):
            yield run


def end(path: Path, state: str) -> None:
    """Record the end of the run in ``path``, in place of its dead writer.

    Raises RunLocked when another process has resumed it; OSError or ArtifactDamaged when run.json cannot be read or
    written.
    """
    with (path / ".lock").open("a+") as held:
        _lock(held, path)
        recorded = read_state(path)
        if recorded.state == "running":
            recorded.end(state)
            RunDirectory(path, recorded).save()


def read_state(path: Path) -> RunState:
    """Read the run.json of ``path``; raise ArtifactDamaged when it does not hold the state of a run."""
    return read_as(RunState, path / "run.json")


def read_standing(path: Path) -> RunState:
    """Read the run.json of ``path`` for those who only look: what a killed process left as running is interrupted.

    Raises ArtifactDamaged as ``read_state`` does.
    """
    recorded = read_state(path)
    if recorded.state == "running" and _is_abandoned(path):
        recorded.end(INTERRUPTED)
    return recorded


def _is_abandoned(path: Path) -> bool:
    """Return True when the run in ``path`` has no writer: nobody holds its lock, which a process of this machine had.

    Locks of other machines need not be visible here, so what one of them left is not judged.
    """
    try:
        with (path / ".lock").open("r+") as held:
            holder = _holder(held)
            return f" on {socket.gethostname()}, started" in holder and lock(held, wait=False)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def true_state(path: Path) -> RunState:
    """Return the state of the run in ``path`` as its artifacts and verdicts have it.

    What run.json says about them is for scripts to read, and is not believed here. Raises ArtifactDamaged when
    run.json, a manifest or a verdict is damaged.
    """
    recorded = read_state(path)
    judged = [true_stage(path, entry) for entry in recorded.stages]
    return replace(
        recorded,
        state=true_ending(recorded.state, [kept for _, kept in judged]),
        stages=[entry for entry, _ in judged],
    )


def true_stage(path: Path, entry: StageState) -> tuple[StageState, KeptVerdict | None]:
    """Return a stage's entry as its manifest and its verdict have it, with the verdict about this very artifact."""
    folder = path / "stages" / entry.name
    artifact = artifact_of(path, entry)
    if artifact is None:
        found = StageState(
            name=entry.name, kind=entry.kind, seconds=entry.seconds, parent_digest=entry.parent_digest,
            attempts=entry.attempts,
        )  # fmt: skip
        return replace(found, state=entry.state if entry.state in UNFINISHED else "pending"), None
    values = read_manifest(artifact)
    kept = None
    if all(os.path.lexists(folder / name) for name in (VERDICT, SCORECARD)):
        kept = confirmed_verdict(folder / VERDICT)
    if kept is not None and kept.artifact != values["digest"]:
        kept = None
    found = replace(entry, state=entry.state if entry.state in UNFINISHED else "trained", verdict=None, unpromoted=[])
    if kept is not None:
        verdict = kept.verdict
        found.state, found.verdict, found.unpromoted = state_of(verdict), verdict.state, list(verdict.unpromoted)
    _describe(found, artifact, path, Manifest.from_json(values, artifact / MANIFEST), values["digest"])
    return found, kept


def artifact_of(path: Path, entry: StageState) -> Path | None:
    """Return the folder of a stage's artifact; None before it is published."""
    own = path / "stages" / entry.name / "artifact"
    return own if os.path.lexists(own / MANIFEST) else None


def _describe(entry: StageState, artifact: Path, run: Path, manifest: Manifest, digest: str) -> None:
    """Write into a stage's entry what its artifact says."""
    entry.artifact, entry.digest, entry.parent_digest = os.path.relpath(artifact, run), digest, manifest.parent_digest
    entry.tokens = manifest.metrics.get("tokens")
    entry.eval_loss = manifest.metrics.get("eval_loss")
    entry.warnings = manifest.metrics.get("warnings", [])
    as_kind(StageState, asdict(entry), str(artifact / MANIFEST))


def true_ending(recorded: str, judged: Sequence[KeptVerdict | None]) -> str:
    """Return the state of a run: the recorded one, unless it is an answer of the gates that their verdicts lack."""
    if recorded not in ("done", WARNED, *STATES.values()):
        return recorded
    went_on = False
    for number, kept in enumerate(judged):
        policy = None if kept is None else policy_for(kept.basis.asked[0].gate, kept.verdict.state)
        if kept is not None and _stops(policy, kept, is_last=number == len(judged) - 1):
            return STATES[kept.verdict.state]
        went_on = went_on or policy is OnFail.warn
    if None in judged:
        return INTERRUPTED
    return WARNED if went_on else "done"


def _stops(policy: OnFail | None, kept: KeptVerdict, *, is_last: bool) -> bool:
    """Return whether a run ends at a verdict: there is nothing to roll back to under the first stage on a base."""
    on_base = "parent" not in kept.basis.asked[0].systems
    return policy is OnFail.stop or (policy is OnFail.rollback and on_base and not is_last)


def _state(path: Path, plan: Plan) -> RunState:
    """Return the state of a new or resumed run; known stages keep theirs."""
    known_run = os.path.lexists(path / "run.json")
    former = true_state(path) if known_run else RunState(recipe=plan.recipe, started=_now())
    former.end(INTERRUPTED)  # the lock is ours, so a writer it still calls running is gone
    known = {stage.name: stage for stage in former.stages}
    stages = [known.get(step.name, StageState(name=step.name, kind=step.stage.name)) for step in plan.steps]
    return RunState(
        recipe=plan.recipe, command=["posttrain", *plan.words], started=former.started, date=former.date, stages=stages
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lock(stream: IO[str], path: Path) -> None:
    """Lock the run until ``stream`` is closed; raise RunLocked at once when another process holds it."""
    # A lock, not a file with a process id: the kernel frees it however the process ends, so no dead run stays locked.
    if not (lock(stream, wait=False) or _lock_again(stream)):
        holder = _holder(stream)
        problem = Problem(
            where=str(path), what=f"{holder} writes this run", fix="Wait for it to end, or set output_root=OTHER"
        )
        raise RunLocked(problem) from None
    stream.seek(0)
    stream.truncate()
    stream.write(f"process {os.getpid()} on {socket.gethostname()}, started {_now()},\n")
    stream.flush()


def _lock_again(stream: IO[str]) -> bool:
    """Lock the run after a moment, in which whoever only looks whether it has a writer is done."""
    time.sleep(LOOK_SECONDS)
    return lock(stream, wait=False)


def _holder(stream: IO[str]) -> str:
    """Return what the holder of a run wrote into its lock."""
    try:
        stream.seek(0)
        return stream.read().strip() or "another process"
    except PermissionError:  # of Windows, where a locked file cannot be read
        return "another process"
