"""One answer asked for: its prompt, its sampling, and the events that come back while it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


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
