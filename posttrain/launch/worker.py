"""One of the processes of a launch: ``torchrun ... -m posttrain.launch.worker``, and the file of a job.

It reads the job, runs the stage (job.json), asks its share of a gate (gate.json) or answers its share of questions
(sampling.json), and leaves its outcome beside the job. It knows nothing of recipes and of Hydra, and publishes nothing:
the command that wrote the job verifies and publishes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from posttrain import environment
from posttrain.errors import Interrupted, reject
from posttrain.host import activity, consent
from posttrain.host.supervisor import die_with, watch_files
from posttrain.launch.job import (
    FOLDER,
    GATE_JOB,
    REQUESTS,
    SAMPLING_JOB,
    STOP,
    Job,
    config_of,
    parent_of,
    read_job,
    read_records,
)
from posttrain.launch.outcome import Outcome, outcome_of, write_outcome
from posttrain.launch.signs import RankAnswers, RankProgress, descends_from

if TYPE_CHECKING:
    from posttrain.context import StageContext
    from posttrain.host.plugins import Host
    from posttrain.stage import Progress

STAGE_DEPTH = 2
"""Folders from a run to the file of a job in it: RUN/stages/NAME/job.json."""


class Stop:
    """Request to stop: a signal or a file asks for it, a second signal ends the process."""

    def __init__(self, file: Path) -> None:
        self._asked, self._file = False, file

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def requested(self) -> bool:
        """Return True after the first signal, or when the file exists."""
        return self._asked or self._file.exists()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise Interrupted(f"stopped by {signal.Signals(number).name}")
        self._asked = True


def main(arguments: list[str]) -> int:
    """Run the job in the file that is the only argument; return its exit code."""
    path, rank = Path(arguments[0]), int(os.environ["RANK"])
    stop = Stop(path.parent / FOLDER / STOP)
    if threading.current_thread() is threading.main_thread():  # in Ray's workers it is another, which gets no signals
        stop.install()
        die_with(os.getppid())
        watch_files(lambda error: write_outcome(path.parent / FOLDER, outcome_of(rank, error)))
    environment.prepare()
    try:
        metrics = KINDS.get(path.name, _work)(path, rank, stop)
        outcome = Outcome(rank=rank, code=0, time=time.time(), metrics=metrics if rank == 0 else {})
    except BaseException as error:
        outcome = outcome_of(rank, error)
        print(outcome.traceback or f"error: {outcome.message}", file=sys.stderr)
    write_outcome(path.parent / FOLDER, outcome)
    return outcome.code


def _work(path: Path, rank: int, stop: Stop) -> dict[str, object]:
    """Run the stage; return its figures."""
    job = read_job(path)
    _require_command(job.command)
    progress = RankProgress(path.parent / FOLDER, rank, job.name)
    with environment.importing():
        from posttrain.engine import processes
        from posttrain.host import plugins
        from posttrain.launch.plugin import run_here

    host = plugins.load()
    if job.kind not in host.stages or host.origin(job.kind) != job.origin:
        found = host.origin(job.kind) if job.kind in host.stages else "no plugin"
        fix = "Install the same plugins on every node"
        reject(str(path), f"stage {job.name!r} is that of {job.origin}, but {found} has it here", fix)
    processes.join(job.silence_seconds)
    if processes.world() != job.world:
        reject(str(path), f"the launcher started {processes.world()} processes, but the job is for {job.world}")
    context = context_of(job, path.parent / FOLDER, host, progress, stop.requested)
    if processes.agree(stop.requested()):
        raise Interrupted("stopped before the first step")
    with activity.running(path.parents[STAGE_DEPTH]), consent.given_by(job.consent):
        run_here(host.stages[job.kind], context, writes=rank == 0)
    processes.leave()
    return context.metrics


def context_of(
    job: Job, folder: Path, host: Host, progress: Progress, stop_requested: Callable[[], bool]
) -> StageContext:
    """Return the context of a job's stage in one of its processes; ``folder`` holds the records."""
    from posttrain.context import StageContext
    from posttrain.rewards.scorer import choose

    config = config_of(job, host.stages[job.kind])
    given, kept = config.rewarding(), Path(job.kept) if job.kept else None
    return StageContext(
        name=job.name, config=config, parent=parent_of(job), records=read_records(folder, job.records),
        eval_records=read_records(folder, job.eval_records), seed=job.seed, dtype=job.dtype, engine=job.engine,
        progress=progress, stop_requested=stop_requested, checkpoints=Path(job.checkpoints), output=Path(job.output),
        kept=kept, data_workers=job.data_workers, clusters=dict(job.clusters),
        scorer=None if given is None else choose(given, host.rewards, host.reward_owners, kept),
        trail=Path(job.trail) if job.trail else None, gate_tasks=job.gate_tasks, metrics=dict(job.metrics),
    )  # fmt: skip


def _ask(path: Path, rank: int, stop: Stop) -> dict[str, object]:
    """Ask this process' share of a gate; there are no figures."""
    from posttrain.launch.gate import read_gate_job, read_requests

    job = read_gate_job(path)
    _require_command(job.command)
    progress = RankAnswers(path.parent / FOLDER, rank)
    with environment.importing():
        from posttrain.engine import processes
        from posttrain.host import plugins
        from posttrain.model.device import default_device
        from posttrain.model.loading import load_model, load_tokenizer
        from posttrain.scoring.inquiry import ask_share
        from posttrain.scoring.systems import Loading

    plugins.load()  # one may know the architecture of a model
    _require_world(path, job.world)
    processes.take_device()
    inquiry, device = job.inquiry(), default_device().type
    if device != inquiry.device:
        where = f"rank {rank} on {os.uname().nodename} computes on {device}, but the command on {inquiry.device}"
        reject(str(path), where, "Give each process a GPU, or none of them and the command")
    requests = read_requests(path.parent / FOLDER / REQUESTS, job.requests, inquiry.places(rank, job.world))
    loading = Loading(load_model, load_tokenizer, device)
    ask_share(inquiry, requests, (rank, job.world), loading, progress, stop.requested)
    return {}


def _sample(path: Path, rank: int, stop: Stop) -> dict[str, object]:
    """Answer this process' share of the questions; there are no figures."""
    with environment.importing():
        from posttrain.engine import processes
        from posttrain.host import plugins
        from posttrain.launch.answers import answer_share, read_sampling_job

    job = read_sampling_job(path)
    _require_command(job.command)
    plugins.load()  # one may know the architecture of a model
    _require_world(path, job.world)
    processes.take_device()
    answer_share(path, job, rank, stop.requested)
    return {}


KINDS = {GATE_JOB: _ask, SAMPLING_JOB: _sample}
"""Work of a process by the name of its job; any other is a stage's."""


def _require_world(path: Path, expected: int) -> None:
    """Raise BadInput unless the launcher has started the processes that the job is for."""
    if (world := int(os.environ["WORLD_SIZE"])) != expected:
        reject(str(path), f"the launcher started {world} processes, but the job is for {expected}")


def _require_command(command: int | None) -> None:
    """Raise Interrupted unless this process descends from the command, where it has to."""
    if command is not None and not descends_from(command):
        raise Interrupted("the launcher is gone")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a process group that failed would wait for the others
