"""Sampled answers scored by a weighted sum of rewards, as a setting names them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.ranges import out_of_range
from posttrain.disk import is_machine_error
from posttrain.errors import BadInput, PluginFailed, PosttrainError, Problem, suggest
from posttrain.quoting import one_line
from posttrain.rewards.reward import MOST, NOTE_BYTES, Attempt, Reward, Score, Scores

if TYPE_CHECKING:
    from posttrain.data.records import Question

WEIGHT = "weight"
"""Key of a reward's weight beside its settings."""
MOST_WEIGHT = 1e6
"""Greatest weight, either way."""
MOST_PROBLEMS = 20
"""Questions named in one message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """The scores of one answer."""

    parts: Mapping[str, float]
    """Score by each reward that could score it."""
    notes: Mapping[str, str]
    """Note of each reward that left one."""
    reward: float | None
    """Weighted sum of the scores; None when a reward could not score the answer."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A weighted sum of rewards."""

    rewards: Sequence[Reward]
    """Rewards that are added up."""
    weights: Sequence[float]
    """Weight of each."""
    owners: Mapping[str, str]
    """The plugin of each reward, with its version, by the reward's name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of those rewards that have any, by name."""
    kept: Path = Path("runs/cache")
    """Folder of what all runs share."""
    _opened: dict[str, Scores] = field(default_factory=dict, repr=False, compare=False)
    """Opened functions of the rewards that score several answers, by name."""

    def identities(self) -> dict[str, str]:
        """Return what names the scores of each reward: its version, its plugin, and what it depends on beside them.

        Raises BadInput for a reward that cannot be had here.
        """
        found = {}
        for reward in self.rewards:
            with self._named(reward, "its settings"):
                needed: Any = reward.prepare(self.settings.get(reward.name))
            if not isinstance(needed, str):
                raise self._failed(reward, "its settings", f"prepare gave {needed!r:.80}, not a text")
            named = f"{reward.name} {reward.version} of {self.owners[reward.name]}"
            found[reward.name] = f"{named}, {needed}" if needed else named
        return found

    def problems(self, questions: Sequence[Question]) -> Sequence[Problem]:
        """Return a problem for each question that a reward cannot use."""
        found = []
        for question in questions:
            for reward in self.rewards:
                with self._named(reward, question.where):
                    lack: Any = reward.lacks(question)
                if not isinstance(lack, str | None):
                    raise self._failed(reward, question.where, f"lacks gave {lack!r:.80}, neither a text nor None")
                if lack is not None:
                    fix = "Complete the question, leave it out, or choose another reward"
                    what = f"{lack}, which the reward {reward.name} needs"
                    found.append(Problem(where=question.where, what=what, fix=fix))
        return found

    def rate(self, attempts: Sequence[Attempt]) -> list[Rated]:
        """Return the scores of every answer.

        Raises PluginFailed naming the reward, the question and the fault when one raises, gives anything but one
        finite number, or another number of scores than there are answers. An error of the machine passes.
        """
        columns = {reward.name: self._scores(reward, attempts) for reward in self.rewards} if attempts else {}
        found = []
        for row in range(len(attempts)):
            scores = {name: column[row] for name, column in columns.items()}
            parts = {name: score.value for name, score in scores.items() if score.value is not None}
            notes = {name: score.note for name, score in scores.items() if score.note}
            found.append(Rated(parts=parts, notes=notes, reward=self.total(parts)))
        return found

    def total(self, parts: Mapping[str, float]) -> float | None:
        """Return the weighted sum of the scores of an answer; None when one is missing."""
        if any(reward.name not in parts for reward in self.rewards):
            return None
        return sum(weight * parts[reward.name] for reward, weight in zip(self.rewards, self.weights, strict=True))

    def _scores(self, reward: Reward, attempts: Sequence[Attempt]) -> list[Score]:
        first, last = attempts[0].question.where, attempts[-1].question.where
        where = first if first == last else f"{first} to {last}"
        if reward.score is None:
            with self._named(reward, where):
                given: Any = self._open(reward)(attempts)
        else:
            given = []
            for each in attempts:
                with self._named(reward, each.question.where):
                    given.append(reward.score(each.question, each.text, each.ended))
        if not isinstance(given, Sequence) or isinstance(given, str | bytes | bytearray):
            raise self._failed(
                reward, where, f"it gave {_shown(given)} for {len(attempts)} answers, not a list of scores"
            )
        if len(given) != len(attempts):
            raise self._failed(reward, where, f"it gave {len(given)} scores for {len(attempts)} answers")
        return [self._checked(reward, each, value) for each, value in zip(attempts, given, strict=True)]

    def _open(self, reward: Reward) -> Scores:
        if reward.name not in self._opened:
            assert reward.open is not None  # a reward without score has it: registration sees to it
            self._opened[reward.name] = reward.open(self.settings.get(reward.name), self.kept)
        return self._opened[reward.name]

    def _checked(self, reward: Reward, attempt: Attempt, given: Any) -> Score:
        score = given if isinstance(given, Score) else Score(value=given)
        value: Any = score.value
        unscored = value is None and isinstance(given, Score)
        if not unscored and not (isinstance(value, Real) and value <= MOST and not value < -MOST):
            what = f"it gave {_shown(value)} for {attempt.text!r:.80}, not one finite number of at most {MOST:g}"
            raise self._failed(reward, attempt.question.where, what)
        note: Any = score.note
        if not isinstance(note, str):
            raise self._failed(reward, attempt.question.where, f"it left the note {_shown(note)}, not a text")
        note = one_line(note).encode(errors="replace")[:NOTE_BYTES].decode(errors="ignore")
        return Score(value=None if unscored else float(value), note=note or ("unscored" if unscored else ""))

    @contextlib.contextmanager
    def _named(self, reward: Reward, where: str) -> Iterator[None]:
        try:
            yield
        except PluginFailed as error:
            raise PluginFailed(f"{error}, at {where}") from error
        except PosttrainError:
            raise
        except (Exception, SystemExit) as error:
            if is_machine_error(error):
                raise
            raise self._failed(reward, where, f"{type(error).__name__}: {error}") from error

    def _failed(self, reward: Reward, where: str, what: str) -> PluginFailed:
        return PluginFailed(f"reward {reward.name} of {self.owners[reward.name]} at {where}: {what}")


def _shown(value: Any) -> str:
    """Return a value as text for a message, in one line of 80 characters at most."""
    try:
        return f"{one_line(repr(value)):.80}"
    except Exception:  # a stranger's own, or a number of too many digits
        return f"an object of the type {type(value).__name__}"


def count_notes(rated: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Return how many answers have each note, the most frequent first, from the notes of each answer."""
    counts = Counter(f"{name}: {note}" for notes in rated for name, note in notes.items())
    return dict(counts.most_common())


def read_choice(given: Any) -> dict[str, tuple[float, dict[str, Any]]]:
    """Return the weight and the settings of each reward, from a setting: a name, a list of names, or a mapping.

    Raises ValueError with what is wrong.
    """
    if isinstance(given, str):
        return {given: (1.0, {})}
    if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        if len(set(given)) < len(given):
            raise ValueError(f"names a reward twice: {', '.join(given)}")
        return {name: (1.0, {}) for name in given}
    if isinstance(given, Mapping) and given:
        return {str(name): _weighed(str(name), each) for name, each in given.items()}
    raise ValueError(f"{given!r} is neither the name of a reward, nor a list of them, nor weights by name")


def choose(given: Any, rewards: Mapping[str, Reward], owners: Mapping[str, str], kept: Path | None = None) -> Scorer:
    """Return the scorer of a setting; ``kept`` is the folder of what runs share.

    Raises ValueError for a setting that names no known reward, or gives one settings it does not have.
    """
    chosen = read_choice(given)
    for name in chosen:
        if name not in rewards:
            raise ValueError(f"no reward is called {name!r}. {suggest(name, rewards)}")
    settings = {name: _typed(rewards[name], values) for name, (_, values) in chosen.items()}
    return Scorer(
        rewards=[rewards[name] for name in chosen],
        weights=[weight for weight, _ in chosen.values()],
        owners={name: owners[name] for name in chosen},
        settings={name: value for name, value in settings.items() if value is not None},
        kept=kept or Path("runs/cache"),
    )


def _weighed(name: str, given: Any) -> tuple[float, dict[str, Any]]:
    values = {str(key): value for key, value in given.items()} if isinstance(given, Mapping) else {WEIGHT: given}
    weight = values.pop(WEIGHT, 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
        raise ValueError(f"the weight of {name} is {weight!r}, not a finite number")
    if abs(weight) > MOST_WEIGHT:
        raise ValueError(f"the weight of {name} is {weight:g}; the most is {MOST_WEIGHT:g} either way")
    return float(weight), values


def _typed(reward: Reward, values: Mapping[str, Any]) -> Any:
    """Return the settings of a reward; None for one that has none. Raises ValueError with what is wrong."""
    known = {each.name: each for each in fields(reward.settings)} if reward.settings is not None else {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{reward.name} has no setting {name!r}. {suggest(name, [*known, WEIGHT])}")
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"{reward.name}.{name} is {value!r:.80}, not one value")
    if reward.settings is None:
        return None
    absent = [name for name, each in known.items() if each.default is MISSING and name not in values]
    if absent:
        example = f"reward: {{{reward.name}: {{{', '.join(f'{name}: ...' for name in absent)}}}}}"
        raise ValueError(f"{reward.name} needs {' and '.join(absent)}: {example}")
    for name, value in values.items():
        if known[name].type in (str, "str") and not isinstance(value, str):
            raise ValueError(f"{reward.name}.{name} is {value!r}, not a text")
    settings = reward.settings(**values)
    if faults := out_of_range(settings):
        raise ValueError("; ".join(f"{reward.name}.{name} {what}" for name, what in faults))
    return settings


def prepared(given: Any, rewards: Mapping[str, Reward], owners: Mapping[str, str], where: str) -> dict[str, str]:
    """Return what names the scores of each reward of a setting. Raises BadInput at ``where`` for an unusable one."""
    try:
        return choose(given, rewards, owners).identities()
    except ValueError as error:
        raise BadInput(Problem(where=where, what=str(error))) from None
