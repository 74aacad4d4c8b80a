"""One answer asked for: its prompt, its sampling, and the events that come back while it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one answer."""

    max_tokens: int
    """Most tokens of the answer."""
    temperature: float = 0.0
    """Divisor of the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of probability from whose likeliest tokens one is drawn."""
    seed: int = 0
    """Start of the random numbers: the same seed draws the same answer."""
    top_logprobs: int | None = None
    """Likeliest tokens that are reported beside the chosen one; None reports no log-probabilities."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer."""

    id: int
    logprob: float | None = None
    """Log-probability of the token at temperature 1."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, best first."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer."""

    reason: str
    """``stop`` after an end token, ``length`` after the last one allowed, ``failed`` with a ``fault``."""
    fault: str = ""


Event = Token | Ended


@dataclass(eq=False, kw_only=True)
class Ask:
    """One answer asked for."""

    system: str
    """Digest of the model."""
    prompt: list[int]
    sampling: Sampling
    ends: frozenset[int]
    """Ids that end the answer; the one that does is no part of it."""
    send: Callable[[Event], None]
    """Takes every event, in the thread that generates."""
    cancelled: bool = field(default=False)
    """True when nobody waits for the answer any more."""


class Generator(Protocol):
    """The maker of answers: the engine of this process, or vLLM."""

    @property
    def ready(self) -> bool:
        """True while models can be asked."""

    @property
    def waiting(self) -> int:
        """Number of answers that have not begun."""

    @property
    def running(self) -> int:
        """Number of answers in the making."""

    def submit(self, asks: Sequence[Ask]) -> None:
        """Queue the answers of one request, all or none. Raises QueueFull, Unloaded or Unavailable."""

    def call(self, job: Callable[[], T]) -> T:
        """Call ``job`` where no model comes or goes meanwhile; return its result or raise its error."""

    def release(self, digest: str) -> bool:
        """Take no more answers of a model, unless some are open; return True when it takes none."""

    def stop(self) -> None:
        """End; answers that are not complete fail."""
