"""The spend cap of a run: its time over all attempts, and the stop before it is exceeded."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.config.money import Amount, price_of
from posttrain.disk import replace_text
from posttrain.environment import cores
from posttrain.errors import Interrupted, SpendCapReached, reject
from posttrain.launch.shape import shape_of
from posttrain.model.device import CUDA, default_device
from posttrain.plan import Plan
from posttrain.run.directory import read_state
from posttrain.run.interrupts import Interrupts
from posttrain.saved import read_as

RECORD = "spending.json"
LOOK_SECONDS = 0.5
RECORD_SECONDS = 30.0


@dataclass(kw_only=True)
class Spent:
    """Content of spending.json."""

    seconds: float = 0.0
    """Time of all attempts."""
    stopping: float = 0.0
    """Seconds that a stop was expected to take: one step to its end, and its checkpoint."""


@dataclass(kw_only=True)
class Spending:
    """The watch over the spend cap of one run."""

    cap: Amount
    price: Amount | None
    """Price of all devices for an hour; None for a cap in hours."""
    path: Path
    before: Spent
    """The attempts before this one."""
    interrupts: Interrupts
    say: Callable[[str], None]
    started: float
    reason: str = ""
    """The reason of the stop, once the cap is reached."""

    @property
    def seconds(self) -> float:
        """Seconds that the cap allows."""
        return self.cap.value / (1 if self.price is None else self.price.value) * 3600

    @property
    def spent(self) -> Spent:
        """The time by now."""
        longest = max(self.before.stopping, 2 * self.interrupts.longest_step)
        return Spent(seconds=self.before.seconds + time.monotonic() - self.started, stopping=longest)

    def describe(self) -> str:
        """Return the cap, with its price and its time where it is money."""
        if self.price is None:
            return str(self.cap)
        hours = Amount(value=self.seconds / 3600, unit="hours")
        return f"{self.cap}, which is {hours} at {self.price} an hour"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Stop what runs inside before the cap is exceeded. Raises SpendCapReached in place of Interrupted."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        except Interrupted as error:
            if not self.reason:
                raise
            fix = "With a higher spend_cap the same command resumes from there"
            raise SpendCapReached(f"{self.reason}: {error}. {fix}") from error
        finally:
            ended.set()
            thread.join()
            self._record()

    def require_room(self) -> None:
        """Raise BadInput when the attempts so far have spent the cap: a job that is queued again must not go on."""
        left = self.seconds - self.before.seconds
        if left <= max(self.before.stopping, 0.0):
            took = Amount(value=max(self.before.seconds, 1e-9) / 3600, unit="hours")
            what = f"the cap is {self.describe()}, and this run has taken {took}"
            reject("spend_cap", what, "Give a higher spend_cap: the same command resumes from the last checkpoint")

    def _watch(self, ended: threading.Event) -> None:
        recorded = time.monotonic()
        while not ended.wait(LOOK_SECONDS):
            spent = self.spent
            if not self.reason and spent.seconds + spent.stopping >= self.seconds:
                self.reason = f"the spend cap of {self.describe()} is reached"
                self.say(self.reason)
                self.interrupts.stop()
            if time.monotonic() - recorded > RECORD_SECONDS:
                recorded = time.monotonic()
                self._record()

    def _record(self) -> None:
        replace_text(self.path, json.dumps(asdict(self.spent)) + "\n")


def within_cap(
    plan: Plan, run: Path, interrupts: Interrupts, say: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """Return the context in which the run in a folder may spend what is left of its cap.

    Raises BadInput for a device without a price, and when nothing is left.
    """
    if plan.spend_cap is None:
        return contextlib.nullcontext()
    path = run / RECORD
    kept = read_as(Spent, path) if os.path.lexists(path) else Spent()
    known = read_state(run).stages if os.path.lexists(run / "run.json") else []
    trained = sum(stage.seconds or 0.0 for stage in known)
    spending = Spending(
        cap=plan.spend_cap, price=None if plan.spend_cap.is_time else _price(plan), path=path,
        before=Spent(seconds=max(kept.seconds, trained), stopping=kept.stopping), interrupts=interrupts, say=say,
        started=time.monotonic(),
    )  # fmt: skip
    spending.require_room()
    return spending.watched()


def _price(plan: Plan) -> Amount:
    """Return the price of an hour of all devices of a plan."""
    price = plan.price_per_hour
    if price is None:
        gpu = _gpu()
        price = price_of(gpu, cores())
        if price is None:
            what = f"no price of {gpu} is known"
            reject("spend_cap", what, "Give price_per_hour=2.50 USD, or a cap in hours: spend_cap='2 hours'")
        return Amount(value=price.value * (shape_of(plan.launch).world if gpu else 1), unit=price.unit)
    return Amount(value=price.value * shape_of(plan.launch).world, unit=price.unit)


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if default_device().type == CUDA else None
