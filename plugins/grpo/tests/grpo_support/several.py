"""The work of one of several processes, for test_grpo_several.py: stages on each engine, stopped and resumed, too.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m grpo_support.several JOB JOB_OF_FULL_WEIGHTS
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from posttrain_grpo.stage import run

from posttrain import Interrupted
from posttrain.engine import processes
from posttrain.host import consent, plugins
from posttrain.launch.job import FOLDER, read_job
from posttrain.launch.worker import context_of
from posttrain.testing import Recorder
from tests.support.training import join


def train(path: Path, engine: str, name: str, stop: Callable[[], bool] = lambda: False) -> None:
    """Run the stage of a job on an engine, in a folder of its own beside it; process 0 leaves what it reported."""
    told, folder = Recorder(), path.parent / engine / name
    job = read_job(path)
    context = context_of(job, path.parent / FOLDER, plugins.load(), told, stop)
    places = {part: folder / part for part in ("checkpoints", "output", "trail")}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    try:
        with consent.given_by(job.consent):
            run(replace(context, engine=engine, **places))
    finally:
        processes.wait()
        if processes.rank() == 0:
            steps = {step: dict(metrics) for step, metrics in told.steps.items()}
            (folder / "steps.json").write_text(json.dumps(steps))


def interrupt(path: Path, engine: str, name: str, after: int) -> None:
    """Train until only the last process is asked to stop, after step ``after``."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return processes.rank() == processes.world() - 1 and len(asked) >= after

    try:
        train(path, engine, name, stop)
    except Interrupted:
        return
    raise AssertionError("it was not stopped")


def main(path: Path, full: Path) -> None:
    """Run the stages."""
    join()
    train(path, "ddp", "whole")
    interrupt(path, "ddp", "resumed", after=1)
    train(path, "ddp", "resumed")
    for engine in ("fsdp", "deepspeed"):
        train(path, engine, "whole")
        if processes.rank() == 0:  # as if it had been killed after its only checkpoint
            shutil.copytree(path.parent / engine / "whole", path.parent / engine / "resumed")
            shutil.rmtree(path.parent / engine / "resumed" / "output")
        processes.wait()
        train(path, engine, "resumed")
        train(full, engine, "whole")
    processes.leave()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
