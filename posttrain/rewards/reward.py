"""Rewards as plugins register them, and answers scored by a weighted sum of several."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.errors import PluginFailed, PosttrainError, Problem, suggest

if TYPE_CHECKING:
    from posttrain.data.records import Question


def lacks_nothing(question: Question) -> str | None:
    """Return None: the reward reads nothing of a question that could be missing."""
    return None


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward of answers, as a plugin registers it."""

    name: str
    """Name in recipes."""
    summary: str
    """One line for ``posttrain list rewards``."""
    version: int
    """Version of its scores, part of every result's name: raise it with each change of a score."""
    score: Callable[[Question, str, bool], float]
    """Returns one finite number for an answer: the question, the answer's text, True when the answer ended by itself
    and False when it was cut at ``max_tokens``."""
    lacks: Callable[[Question], str | None] = lacks_nothing
    """Returns what a question lacks for this reward, as in ``has no answer``; None for a usable question."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A weighted sum of rewards."""

    rewards: Sequence[Reward]
    """Rewards that are added up."""
    weights: Sequence[float]
    """Weight of each."""
    owners: Mapping[str, str]
    """The plugin of each reward, with its version, by the reward's name."""

    def problems(self, questions: Sequence[Question]) -> Sequence[Problem]:
        """Return a problem for each question that a reward cannot use."""
        found = []
        for question in questions:
            for reward in self.rewards:
                with self._named(reward, question):
                    lack = reward.lacks(question)
                if lack is not None:
                    fix = "Complete the question, leave it out, or choose another reward"
                    what = f"{lack}, which the reward {reward.name} needs"
                    found.append(Problem(where=question.where, what=what, fix=fix))
        return found

    def parts(self, question: Question, text: str, ended: bool) -> dict[str, float]:
        """Return the score of an answer by each reward.

        Raises PluginFailed naming the reward, the question and the fault when one raises, or gives anything but one
        finite number.
        """
        found: dict[str, float] = {}
        for reward in self.rewards:
            with self._named(reward, question):
                value: Any = reward.score(question, text, ended)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise self._failed(reward, question, f"it gave {value!r:.80} for {text!r:.80}, not one finite number")
            found[reward.name] = float(value)
        return found

    def total(self, parts: Mapping[str, float]) -> float:
        """Return the weighted sum of the scores of an answer."""
        return sum(weight * parts[reward.name] for reward, weight in zip(self.rewards, self.weights, strict=True))

    @contextlib.contextmanager
    def _named(self, reward: Reward, question: Question) -> Iterator[None]:
        try:
            yield
        except PosttrainError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed(reward, question, f"{type(error).__name__}: {error}") from error

    def _failed(self, reward: Reward, question: Question, what: str) -> PluginFailed:
        return PluginFailed(f"reward {reward.name} of {self.owners[reward.name]} at {question.where}: {what}")


def identity(reward: Reward, owner: str) -> str:
    """Return what names a reward's scores: its name, its version, and its plugin with its version."""
    return f"{reward.name} {reward.version} of {owner}"


def read_weights(given: Any) -> dict[str, float]:
    """Return the weight of each reward from a setting: a name, a list of names, or weights by name.

    Raises ValueError with what is wrong.
    """
    if isinstance(given, str):
        return {given: 1.0}
    if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        if len(set(given)) < len(given):
            raise ValueError(f"names a reward twice: {', '.join(given)}")
        return dict.fromkeys(given, 1.0)
    if isinstance(given, Mapping) and given:
        for name, weight in given.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"the weight of {name} is {weight!r}, not a finite number")
        return {str(name): float(weight) for name, weight in given.items()}
    raise ValueError(f"{given!r} is neither the name of a reward, nor a list of them, nor weights by name")


def choose(given: Any, rewards: Mapping[str, Reward], owners: Mapping[str, str]) -> Scorer:
    """Return the scorer of a setting. Raises ValueError for a setting that names no known reward."""
    weights = read_weights(given)
    for name in weights:
        if name not in rewards:
            raise ValueError(f"no reward is called {name!r}. {suggest(name, rewards)}")
    return Scorer(
        rewards=[rewards[name] for name in weights],
        weights=list(weights.values()),
        owners={name: owners[name] for name in weights},
    )
