"""A launcher and its processes without torch, for the faults of both: ``python processes.py JOB [RANK]``.

The launcher does what torchrun does: it starts every process in a session of its own, passes SIGTERM on, and ends the
others when one has failed. What a process does is in ``ACT_<rank>``, or ``ACT``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from posttrain.errors import Diverged, Interrupted, reject
from posttrain.host.supervisor import die_with
from posttrain.launch.job import FOLDER, STOP
from posttrain.launch.outcome import Outcome, outcome_of, write_outcome
from posttrain.launch.signs import RankProgress, descends_from
from posttrain.launch.worker import Stop


def launch(path: Path, world: int) -> int:
    """Start all, wait for all; return 1 when any failed."""
    children = [
        subprocess.Popen([sys.executable, __file__, str(path), str(rank)], start_new_session=True)
        for rank in range(world)
    ]

    def forward(number: int, frame: object) -> None:
        for child in children:
            child.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, forward)
    told = False
    while None in [child.poll() for child in children]:
        if not told and any(child.poll() for child in children):
            told = True
            forward(0, None)
        time.sleep(0.05)
    for child in children:
        if child.returncode < 0:
            print(f"  exitcode  : {child.returncode} (pid: {child.pid})", flush=True)
    return int(any(child.returncode for child in children))


class Process:
    """One process of a stage of ten steps."""

    def __init__(self, path: Path, rank: int) -> None:
        self.stop, self.rank = Stop(path.parent / FOLDER / STOP), rank
        self.stop.install()
        self.progress = RankProgress(path.parent / FOLDER, rank, "mine")
        self.seen = path.parent / f"seen.{rank}"
        self.seen.write_text(str(os.getpid()))

    def train(self) -> dict[str, object]:
        """Take the steps; do the act at step 3."""
        self.progress.start(10)
        for step in range(1, 11):
            if step == 3:
                getattr(self, os.environ.get(f"ACT_{self.rank}", os.environ.get("ACT", "go")))()
            if self.stop.requested():
                raise Interrupted(f"stopped after step {step} of 10")
            self.progress.part(1, 1, "row")
            self.progress.step(step, {"loss": 1.0, "tokens": 2})
        self.progress.note("trained")
        return {"steps": 10, "rank": self.rank}

    def go(self) -> None:
        """Go on."""

    def reject(self) -> None:
        """Find bad input."""
        reject("sft.data", "has a bad record", "Mend it")

    def fill(self) -> None:
        """Find the disk full."""
        self.seen.with_name("full").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/step")

    def lack(self) -> None:
        """Miss the part of another, who found it at the same step."""
        while not self.seen.with_name("full").exists():
            time.sleep(0.02)
        raise Interrupted("another process could not write its part")

    def diverge(self) -> None:
        """Find an infinite loss."""
        raise Diverged("training diverged at step 3: the loss is nan")

    def bug(self) -> None:
        """Raise what nobody expects."""
        raise KeyError("prompt")

    def lose(self) -> None:
        """Notice that another is gone."""
        time.sleep(0.5)
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    def die(self) -> None:
        """Die for lack of memory."""
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        """Hang, whatever the signal; the second may not end it either."""
        while True:
            try:
                time.sleep(60)
            except Interrupted:
                continue

    def wait(self) -> None:
        """Wait for a signal."""
        while not self.stop.requested():
            time.sleep(0.02)


def main(path: Path, rank: int) -> int:
    """Run one process."""
    die_with(os.getppid())
    command = json.loads(path.read_text())["command"]
    if command is not None and not descends_from(command):
        return 1
    try:
        outcome = Outcome(rank=rank, code=0, time=time.time(), metrics=Process(path, rank).train())
    except BaseException as error:
        outcome = outcome_of(rank, error)
    write_outcome(path.parent / FOLDER, outcome)
    return outcome.code


if __name__ == "__main__":
    file = Path(sys.argv[1])
    if len(sys.argv) == 3:
        os._exit(main(file, int(sys.argv[2])))
    sys.exit(launch(file, json.loads(file.read_text())["world"]))
