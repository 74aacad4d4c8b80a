"""The frame of a comparison: every contender does the same job in a process of its own, one after another.

A script calls ``main`` with its own command line and with the function that does the job as one contender; ``measured``
starts the script again as that contender and returns its result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import machine

CONTENDER = "--contender"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
Job = TypeVar("Job")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one contender."""

    contender: str
    seconds: float
    """Seconds from the first forward pass to the end of the last step."""
    cpu_seconds: float
    """Seconds on processors, which count no other work on the machine."""
    peak_bytes: int
    """Peak memory: of the device on CUDA, of the process on a CPU."""
    activation_bytes: int
    """Part of the peak that came after the beginning of the first forward pass."""
    losses: Sequence[float]
    """Loss of each step."""
    counts: Mapping[str, int]
    """Amounts that were trained, such as pairs or tokens."""
    mfu: float | None = None
    """The model-FLOPs share, where the contender reports it."""


def main(job: type[Job], contend: Callable[[str, Job], Result], command: Callable[[], None]) -> None:
    """Run the script's ``command``, or ``contend`` when this process is one contender of it."""
    if sys.argv[1:2] != [CONTENDER]:
        command()
        return
    name, given = sys.argv[2:4]
    print(json.dumps(asdict(contend(name, job(**json.loads(given))))))


def measured(script: str, contender: str, job: Any) -> Result:
    """Return the result of one contender of ``script``, in a process of its own. Raises RuntimeError when it fails."""
    command = [sys.executable, script, CONTENDER, contender, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | OFFLINE)
    if done.returncode:
        raise RuntimeError(f"{contender} failed:\n{done.stderr[-3000:]}")
    result = Result(**json.loads(done.stdout.strip().splitlines()[-1]))
    times = f"{result.seconds:8.1f} s, {result.cpu_seconds:8.1f} s of processors"
    print(f"  {contender:<16}{times}   loss {result.losses[-1]:.4f}", file=sys.stderr, flush=True)
    return result


def report_of(job: Any, **rest: Any) -> dict[str, Any]:
    """Return a report of ``job`` on this machine, without the paths of its files."""
    named = {key: Path(value).name for key, value in asdict(job).items() if key in ("model", "data")}
    return {**machine.described(), "job": {**asdict(job), **named}, **rest}


def write_report(report: Mapping[str, Any], folder: Path | None, name: str) -> None:
    """Write a report into ``folder``, named after the device and ``name``."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name.partition('-')[0]}-{report['device'].split()[0].lower()}-{name.partition('-')[2]}.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


class Meter:
    """Times, memory and figures from the first forward pass to the end of the last step; a stage's progress, too."""

    def __init__(self, first: str | None = None) -> None:
        self.first = first
        """Beginning of the note right before the first forward pass; without one, that is the start of the steps."""
        self.times: list[float] = []
        """Seconds of each step."""
        self.steps: list[Mapping[str, float]] = []
        self.notes: list[str] = []
        self.held: int | None = None
        self.device_flops: float | None = None

    def begin(self) -> None:
        """Begin, once."""
        if self.held is None:
            self.held = machine.forget_peak()
            self._begun = self._last = machine.now()
            self._begun_cpu = time.process_time()

    def end(self, metrics: Mapping[str, float]) -> None:
        """Note the end of a step."""
        now = machine.now()
        self.seconds, self.cpu_seconds = now - self._begun, time.process_time() - self._begun_cpu
        self.times.append(now - self._last)
        self._last = now
        self.steps.append(dict(metrics))

    @property
    def mfu(self) -> float | None:
        """The model-FLOPs share of all steps but the first, which warms up."""
        if not self.device_flops or len(self.times) < 2:
            return None
        return sum(step["model_flops"] for step in self.steps[1:]) / sum(self.times[1:]) / self.device_flops

    def result(self, contender: str, **counts: int) -> Result:
        """Return all of it."""
        return Result(
            contender=contender, seconds=self.seconds, cpu_seconds=self.cpu_seconds, counts=counts,
            peak_bytes=machine.peak_bytes(), activation_bytes=machine.peak_bytes() - (self.held or 0),
            losses=[step["loss"] for step in self.steps if "loss" in step], mfu=self.mfu,
        )  # fmt: skip

    def callback(self) -> Any:
        """Return the callback of a trainer of transformers that drives the meter."""
        from transformers import TrainerCallback

        meter = self

        class Stopwatch(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                meter.begin()

            def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
                if "loss" in logs:  # right after the step, as they log every one
                    meter.end({"loss": float(logs["loss"])})

        return Stopwatch()

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Begin, where nothing was computed before."""
        self.device_flops = device_flops
        self.begin()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the end of a step."""
        self.end(metrics)

    def part(self, done: int, total: int, what: str) -> None:
        """Ignore the parts of a step."""

    def note(self, text: str) -> None:
        """Keep a line, and begin at the one right before the first forward pass."""
        print(text, file=sys.stderr)
        self.notes.append(text)
        if self.first is not None and text.startswith(self.first):
            self.begin()
