"""Signs of life of the processes of a launch: a file of each, written by it and read by the command.

In a stage process 0 writes what it has to show: steps with their metrics, parts of steps, notes. The others touch their
files. In a gate each writes its answered documents.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from posttrain.errors import require_finite
from posttrain.saved import lines_of
from posttrain.stage import Progress

PART_SECONDS = 0.5
"""Seconds between two lines about parts of a step."""


def _file(folder: Path, rank: int) -> Path:
    return folder / f"signs.{rank}.jsonl"


class RankSigns:
    """The signs of one process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = _file(folder, rank)
        about = {"pid": os.getpid(), "host": os.uname().nodename, "step": os.environ.get("SLURM_STEP_ID")}
        self._path.write_text(json.dumps(["process", about]) + "\n", encoding="utf-8")

    def tell(self, *event: Any) -> None:
        """Write an event for the command."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")

    def live(self) -> None:
        """Give a sign of life."""
        os.utime(self._path)


class RankAnswers(RankSigns):
    """Progress of one of the processes that ask the systems of a gate."""

    def answered(self, part: int, documents: int, tokens: int = 0) -> None:
        """Tell the answered documents of a part, and the tokens of the next ones."""
        self.tell("answered", part, documents, tokens)

    def cut(self, part: int, prompts: int) -> None:
        """Tell prompts of a part that lost their beginning."""
        self.tell("cut", part, prompts)

    def looked(self, look: int) -> None:
        """Tell that this process has asked its share of a look."""
        self.tell("looked", look)


class RankProgress(RankSigns):
    """Progress of a stage in one of its processes."""

    def __init__(self, folder: Path, rank: int, stage: str) -> None:
        super().__init__(folder, rank)
        self._rank, self._stage = rank, stage
        self._parted = 0.0

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Tell the number of steps."""
        self._tell("start", total_steps, done_steps, device_flops)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell an optimizer step. Raises Diverged when its loss is not finite."""
        require_finite(step, f"loss of {self._stage}", metrics.get("loss", 0.0))
        self._tell("step", step, dict(metrics))

    def part(self, done: int, total: int, what: str) -> None:
        """Tell a part of the step in work."""
        now = time.monotonic()
        if now - self._parted < PART_SECONDS and done < total:
            self.live()
            return
        self._parted = now
        self._tell("part", done, total, what)

    def note(self, text: str) -> None:
        """Tell a line for the user."""
        self._tell("note", text)

    def _tell(self, *event: Any) -> None:
        if self._rank == 0:
            self.tell(*event)
        else:
            self.live()


class Signs:
    """The signs of all processes, as the command reads them."""

    def __init__(self, folder: Path, world: int) -> None:
        self._folder, self._world = folder, world
        self._streams: dict[int, IO[str]] = {}
        self._rests: dict[int, str] = {}
        self._times: dict[int, int] = {}
        self._heard = time.monotonic()
        self._about: dict[int, dict[str, Any]] = {}

    def silence(self) -> float:
        """Return the seconds without a sign of any process, by this machine's clock."""
        times = {rank: _modified(_file(self._folder, rank)) for rank in range(self._world)}
        if times != self._times:
            self._times, self._heard = times, time.monotonic()
        return time.monotonic() - self._heard

    def quietest(self, ranks: list[int]) -> int:
        """Return the process among ``ranks`` whose last sign is the oldest: the others wait for it."""
        return min(ranks, key=lambda rank: (_modified(_file(self._folder, rank)), rank))

    def show(self, progress: Progress) -> None:
        """Pass what process 0 has told since the last call to ``progress``."""
        for _, name, *values in self.events():
            if name in ("start", "step", "part", "note"):
                getattr(progress, name)(*values)

    def processes(self) -> dict[int, dict[str, Any]]:
        """Return number and host of every process that has begun, by its rank."""
        for rank in set(range(self._world)) - self._about.keys():
            try:
                first = _file(self._folder, rank).read_text(encoding="utf-8").partition("\n")
            except FileNotFoundError:
                continue
            if first[1]:
                self._about[rank] = json.loads(first[0])[1]
        return self._about

    def gone(self) -> list[int]:
        """Return the processes of this machine that have begun and are no more."""
        here = {rank: each for rank, each in self.processes().items() if each["host"] == os.uname().nodename}
        return [rank for rank, each in sorted(here.items()) if not is_alive(each["pid"])]

    def events(self) -> Iterator[list[Any]]:
        """Yield what the processes have told since the last call, each event after the rank of its process."""
        for rank in range(self._world):
            if rank not in self._streams:
                try:
                    self._streams[rank] = _file(self._folder, rank).open(encoding="utf-8")
                except FileNotFoundError:
                    continue
            text = self._rests.get(rank, "") + self._streams[rank].read()
            whole, newline, self._rests[rank] = text.rpartition("\n")
            yield from ([rank, *json.loads(line)] for line in lines_of(whole) if newline)


def is_alive(pid: int) -> bool:
    """Return True while the process with this number runs; one that has ended, but was not waited for, does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def descends_from(pid: int) -> bool:
    """Return True when the process with this number started the present one, or one of those above it.

    A process whose launcher died before it could ask to die with it has none of them above.
    """
    above = os.getppid()
    while above > 1 and above != pid:
        try:
            status = Path(f"/proc/{above}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        above = int(status.rpartition(")")[2].split()[1])
    return above == pid


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
