"""The hooks of a run that is tracked. Tracking can never fail a run, and never hold it up for long."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posttrain import hookimpl

if TYPE_CHECKING:
    from posttrain import Artifact, Verdict

START_SECONDS = 60
"""Seconds that a client may take to be imported and to start."""
CALL_SECONDS = 20
"""Seconds that a client may take for anything else."""


class Service(Protocol):
    """One run at a tracking service, open from construction on."""

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        """Log figures, of an optimizer step or of none."""

    def summarize(self, values: Mapping[str, str]) -> None:
        """Write facts about the whole run."""

    def close(self, *, done: bool) -> None:
        """End the run at the service."""


class Tracking:
    """One run of posttrain, sent to a service; steps are logged under ``<stage>/<metric>``."""

    def __init__(self, name: str, start: Callable[[], Service]) -> None:
        self._name, self._start = name, start
        self._service: Service | None = None
        self._broken = False

    @hookimpl
    def step_logged(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log one optimizer step."""
        values = {f"{stage}/{key}": value for key, value in metrics.items()}
        self._call(lambda service: service.log(values, step))

    @hookimpl
    def stage_finished(self, stage: str, artifact: Artifact, verdict: Verdict) -> None:
        """Log the verdict and every lift."""
        lifts = {f"{stage}/lift/{task.task}/{task.against}": task.lift for task in verdict.tasks}
        facts = {f"{stage}/verdict": verdict.state, f"{stage}/artifact": artifact.digest}
        self._call(lambda service: service.log(lifts, None))
        self._call(lambda service: service.summarize(facts))

    @hookimpl
    def run_finished(self, directory: Path, state: str) -> None:
        """Close the run at the service."""
        if self._service is not None:
            self._call(lambda service: service.close(done=state == "done"))

    def _call(self, action: Callable[[Service], None]) -> None:
        """Start the service at the first call, and act; print the first error and do nothing from then on."""
        if self._broken:
            return
        try:
            with _unseen():
                if self._service is None:
                    self._service = _within(START_SECONDS, self._start)
                service = self._service
                _within(CALL_SECONDS, lambda: action(service))
        except Exception as error:  # training continues, whatever the service or its client raises
            self._broken = True
            reason = f"{type(error).__name__}: {error}"
            print(f"{self._name} is off for the rest of this run: {reason}", file=sys.stderr)


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Keep what a client prints off the standard output, which holds results, and put random numbers back."""
    numbers, arrays = random.getstate(), np.random.get_state()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(numbers)  # the client may draw; a plugin must not
        np.random.set_state(arrays)


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """Return what ``action`` returns. Raises TimeoutError when it takes longer: its thread is left behind."""
    outcome: list[tuple[bool, Any]] = []

    def act() -> None:
        try:
            outcome.append((True, action()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=act, daemon=True)  # a daemon does not hold up the end of the process
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:g} s")
    good, value = outcome[0]
    if good:
        return value
    if isinstance(value, Exception):
        raise value
    raise RuntimeError(f"its client ended with {type(value).__name__}: {value}")
