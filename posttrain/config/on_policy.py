"""Settings of answers that a model samples: a source of training data, and ``posttrain sample``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from posttrain.config.ranges import number, out_of_range

MISSING: Any = "???"
BLOCK = 128
"""Answers that a model in this process writes at once."""
REWARD: Any = "right"
"""The reward by default."""

UNKEPT = "Raise k, max_tokens or temperature, ask easier questions, or take another reward"
"""Mends answers none of which became a record."""


class Keep(Enum):
    """The records made of a question's sampled answers."""

    pairs = "pairs"
    best = "best"
    labels = "labels"


SERVED: Mapping[Keep, tuple[str, ...]] = {
    Keep.pairs: ("preferences", "feedback"),
    Keep.best: ("conversations", "documents"),
    Keep.labels: ("feedback",),
}
"""The shapes of records that each choice gives."""


class SamplingBackend(Enum):
    """The library that writes sampled answers."""

    transformers = "transformers"
    vllm = "vllm"


@dataclass(kw_only=True)
class OnPolicy:
    """Training records that the stage's parent makes: it answers the questions, a reward scores, some answers are kept.

    Only answers that ended by themselves become records.
    """

    questions: str = MISSING
    """Questions with their right answers, in the form of gate=local; a path or hub name."""
    k: int = number(8, least=1)
    """Answers sampled to each question."""
    temperature: float = number(0.7, above=0)
    """Temperature of sampling; lower keeps nearer to the likeliest answers."""
    max_tokens: int = number(256, least=1)
    """Longest answer, in tokens: a longer one is cut, counted, and never kept."""
    reward: Any = REWARD
    """A reward by name, a list of them, or weights by name: posttrain list rewards."""
    keep: Keep = Keep.pairs
    """pairs: the best and the worst answer, where they differ. best: the best, where its reward is above least_reward.
    labels: each different answer, good above least_reward."""
    least_reward: float = 0.5
    """Reward above which an answer is good, for best and labels."""
    seed: int = number(0, least=0)
    """Seed of the answers: each draws by its own question and number alone."""

    backend: SamplingBackend = SamplingBackend.transformers
    """transformers, or vllm: a process of vLLM by the command in POSTTRAIN_VLLM, or vllm serve; answers differ."""

    def identity(self) -> dict[str, Any]:
        """Return everything that the records depend on, as plain values: all but the place of the questions."""
        values = {name: value for name, value in asdict(self).items() if name != "questions"}
        return values | {"keep": self.keep.value, "backend": self.backend.value}

    def problems(self) -> Sequence[tuple[str, str]]:
        """Return the settings out of range or against each other, each with what is wrong."""
        found = out_of_range(self)
        if self.keep is Keep.pairs and self.k == 1:
            found.append(("k", "must be at least 2 for pairs: a pair is two answers to one question"))
        return found
