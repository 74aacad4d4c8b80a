"""Processes of a launch, started, watched and ended by the command; those of a stage.

The command keeps lock, ledger, display and publishing. It starts a launcher (torchrun, or srun with torchrun on every
node), shows what process 0 tells, and takes the result from the outcomes that the processes leave. However it ends,
nothing of them is left running.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.context import StageContext
from posttrain.environment import cores
from posttrain.errors import Interrupted, PluginFailed, PosttrainError
from posttrain.host.plugins import CORE_ORIGIN
from posttrain.host.supervisor import die_with
from posttrain.launch import slurm
from posttrain.launch.job import FOLDER, JOB, STOP, write_job
from posttrain.launch.outcome import first_fault, first_stop, read_outcomes
from posttrain.launch.shape import LAUNCHER, Shape, shape_of
from posttrain.launch.signs import Signs, is_alive
from posttrain.stage import Stage

TICK = 0.2
"""Seconds between two looks at the processes."""
SETTLING = 20.0
"""Seconds that the others get to notice the end of one process; those that do not are ended."""
HEAP = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=2097152:glibc.malloc.trim_threshold=67108864"
"""Tunables of glibc's memory: weights gathered and freed layer by layer would fill its heap with holes.

Blocks of two megabytes and more are mapped and given back when freed; as huge pages, so that this costs no time.
"""
MARGIN = 30.0
"""Seconds that a launcher may take beyond ``shutdown_seconds``."""
LOG = "log.txt"
FATE = re.compile(r"exitcode\s*:\s*(-?\d+) \(pid: (\d+)\)")
"""Line of torchrun's report about a process that failed."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Several processes for one stage of a run."""

    launch: LaunchConfig
    folder: Path
    """The stage's folder."""
    origin: str
    """Plugin of the stage, with its version."""

    def __call__(self, stage: Stage, context: StageContext) -> None:
        """Run the stage; its figures are then in ``context.metrics``.

        Raises what one process would: BadInput, Diverged, Interrupted, the plugin's fault. A process that died or
        hangs is a PosttrainError, or PluginFailed in a stage of a plugin.
        """
        shape, path = shape_of(self.launch), (self.folder / JOB).absolute()
        shutil.rmtree(path.parent / FOLDER, ignore_errors=True)
        (path.parent / FOLDER).mkdir()
        write_job(path, stage, context, origin=self.origin, world=shape.world, launch=self.launch)
        if self.launch.kind is Launcher.slurm:
            slurm.check_shared(self.launch, path)
        context.progress.note(f"{shape.world} processes, engine {context.engine}")
        watch = Watch(
            launch=self.launch, shape=shape, path=path, show=lambda signs: signs.show(context.progress),
            stop_requested=context.stop_requested,
        )  # fmt: skip
        watch.run()
        context.metrics.update(figures(watch, context.progress.note, partial(self._failure, context.name)))
        shutil.rmtree(path.parent / FOLDER)
        path.unlink()

    def _failure(self, stage: str, what: str) -> PosttrainError:
        if self.origin == CORE_ORIGIN:
            return PosttrainError(what)
        return PluginFailed(f"stage {stage!r} of plugin {self.origin}: {what}")


def figures(
    watch: Watch, note: Callable[[str], None], failure: Callable[[str], PosttrainError] = PosttrainError
) -> dict[str, object]:
    """Return the figures of process 0 at the end of all; raise the error that explains the end of the processes.

    One that ended without a word, or hangs, is described by ``failure``.
    """
    world, launch = watch.shape.world, watch.launch
    outcomes = read_outcomes(watch.folder, world)
    if len(outcomes) == world and not any(each.code for each in outcomes.values()):
        return dict(outcomes[0].metrics)
    if (fault := first_fault(outcomes)) is not None:
        note(f"rank {fault.rank} of {world} ended with {fault.kind}")
        raise fault.error(world)
    missing = [rank for rank in range(world) if rank not in outcomes]
    if watch.stopped is None and not watch.dead:  # the launcher may have ended the others before anybody looked
        watch.dead = [rank for rank in missing if _exit_code(watch, rank) is not None]
    if (stop := first_stop(outcomes)) is not None and (watch.stopped is not None or not watch.dead):
        raise Interrupted(stop.message)
    if watch.slow:
        limit = f"launch.shutdown_seconds={launch.shutdown_seconds:g}"
        raise Interrupted(f"stopped by a signal, but no step was saved within {limit}")
    if watch.stopped is not None and not watch.dead and not watch.ended:
        raise Interrupted("stopped by a signal; the processes ended without a checkpoint of their last step")
    if not missing:  # each noticed that another was gone
        raise min(outcomes.values(), key=lambda each: each.time).error(world)
    kept = f"(see {watch.folder / LOG}). Nothing published is lost: run the same command to resume"
    raise failure(f"{_loss(watch, missing)} {kept}")


def _loss(watch: Watch, missing: list[int]) -> str:
    """Describe processes that ended without a word, or hang."""
    world = watch.shape.world
    if watch.dead or (not watch.ended and watch.status >= 0):
        rank = (watch.dead or missing)[0]
        return f"rank {rank} of {world} {_fate(watch, rank)}"
    if watch.status < 0 and not watch.ended:
        return f"the launcher of {world} processes was taken down by {signal.Signals(-watch.status).name}"
    rank = watch.signs.quietest(missing)
    silent = f"no sign of life for launch.silence_seconds={watch.launch.silence_seconds:g}"
    why = "the others waited for it in vain" if len(missing) < world else silent
    return f"rank {rank} of {world} hung: {why}"


def _fate(watch: Watch, rank: int) -> str:
    """Describe the end of a process that left no outcome."""
    about = watch.signs.processes().get(rank)
    if about is None:
        log = (watch.folder / LOG).read_text(encoding="utf-8", errors="replace")
        said = [line.strip() for line in log.splitlines() if line.strip()]
        return f"never began; its launcher ended with {watch.status}" + (f": {said[-1][:200]}" if said else "")
    code = _exit_code(watch, rank)
    if code is not None and code < 0:
        memory = ". The system does this when memory runs out" if code == -signal.SIGKILL else ""
        return f"on {about['host']} was taken down by {signal.Signals(-code).name}{memory}"
    return f"on {about['host']} ended" + ("" if code is None else f" with exit code {code}")


def _exit_code(watch: Watch, rank: int) -> int | None:
    """Return the exit code of a process that torchrun reports as failed, minus the signal that ended it."""
    log = (watch.folder / LOG).read_text(encoding="utf-8", errors="replace")
    about = watch.signs.processes().get(rank)
    codes = {int(pid): int(code) for code, pid in FATE.findall(log)}
    return None if about is None else codes.get(about["pid"])


@dataclass(kw_only=True)
class Watch:
    """One launcher, from its start to the end of all of its processes."""

    launch: LaunchConfig
    shape: Shape
    path: Path
    """The job's file."""
    show: Callable[[Signs], None]
    """Display of what the processes tell."""
    stop_requested: Callable[[], bool] = lambda: False
    """Check for a request to stop, which is passed on to them."""
    enough: Callable[[], bool] = lambda: False
    """Check for an end of their work before they are done: they are ended at once."""
    status: int = 0
    """Exit status of the launcher; minus the signal that ended it."""
    stopped: float | None = None
    """Time at which the processes were asked to stop."""
    failing: float | None = None
    """Time at which the first of them was seen to have failed."""
    dead: list[int] = field(default_factory=list)
    """Processes that ended without an outcome, the first one first."""
    slow: bool = False
    """True when they did not stop in time after they were asked to."""
    ended: bool = False
    """True when the command had to end them."""

    def __post_init__(self) -> None:
        """Make the reader of signs."""
        self.folder = self.path.parent / FOLDER
        self.signs = Signs(self.folder, self.shape.world)

    def run(self) -> None:
        """Start the launcher, watch it to its end, and leave nothing running."""
        dying = partial(die_with, os.getpid(), self._death())
        with (self.folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, env=self._environment(), preexec_fn=dying,
            )  # fmt: skip
        try:
            while process.poll() is None and not self.ended and not self.enough():
                self.show(self.signs)
                self._look(process)
                time.sleep(TICK)
        finally:
            self._end(process)
        self.status = process.wait()
        self.show(self.signs)

    def _look(self, process: subprocess.Popen[bytes]) -> None:
        """Forward a request to stop; notice processes that died, failed or hang."""
        now = time.monotonic()
        if self.stopped is None and self.stop_requested():
            self.stopped = now
            (self.folder / STOP).touch()
            if self.launch.kind is not Launcher.own:  # no other one is known to pass it on
                process.send_signal(signal.SIGTERM)
        gone = self.signs.gone()
        outcomes = read_outcomes(self.folder, self.shape.world)
        if process.poll() is not None:  # it took its processes with it
            return
        if self.stopped is None:
            self.dead += [rank for rank in gone if rank not in outcomes and rank not in self.dead]
        failed = any(each.code not in (0, Interrupted.exit_code) for each in outcomes.values())
        if self.failing is None and (self.dead or failed):
            self.failing = now
        self.slow = self.stopped is not None and now - self.stopped > self.launch.shutdown_seconds
        late = self.failing is not None and now - self.failing > SETTLING
        self.ended = late or self.signs.silence() > self.launch.silence_seconds
        self.ended |= self.slow and now - (self.stopped or now) > self.launch.shutdown_seconds + MARGIN

    def _command(self) -> list[str]:
        worker = ["-m", "posttrain.launch.worker", str(self.path)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.shape.per_node)]
        torchrun += ["--shutdown-timeout", str(round(self.launch.shutdown_seconds))]
        if self.launch.kind is Launcher.slurm:
            return slurm.step(self.launch, torchrun, worker)
        if self.launch.kind is Launcher.own:
            return [*shlex.split(os.environ[LAUNCHER]), str(self.path)]
        return [*torchrun, "--standalone", *worker]

    def _environment(self) -> dict[str, str]:
        """Return the environment of the launcher: each process has its share of the cores, and returns freed memory."""
        threads = max(1, cores() // self.shape.per_node)
        return {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": HEAP, **os.environ}

    def _death(self) -> signal.Signals:
        """Return the signal at the command's own end: srun passes SIGTERM on to other nodes, SIGKILL on to none."""
        return signal.SIGKILL if self.launch.kind is Launcher.local else signal.SIGTERM

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End the launcher and its processes at once, as far as they still run."""
        if process.poll() is None:
            if self.launch.kind is Launcher.slurm:
                slurm.cancel(self.signs.processes())
            if self.launch.kind is Launcher.own:
                process.terminate()
                _wait_for_end([process.pid])
            process.kill()  # they die with it
            process.wait()
        here = [each["pid"] for each in self.signs.processes().values() if each["host"] == os.uname().nodename]
        _wait_for_end(here)


def _wait_for_end(pids: Sequence[int], seconds: float = 5.0) -> None:
    """Wait for processes that the kernel is ending."""
    until = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
