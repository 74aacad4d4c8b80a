"""Settings of data preparation: the rules with their defaults, and the action on what each finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from posttrain.config.ranges import number


class Action(Enum):
    """The treatment of rows with a finding: left out, the end of the run, counted, or not looked for."""

    drop = "drop"
    stop = "stop"
    count = "count"
    ignore = "ignore"


class OnContamination(Enum):
    """The treatment of rows that hold a document of a gate: left out, the end of the run, a warning, not looked for."""

    drop = "drop"
    stop = "stop"
    warn = "warn"
    ignore = "ignore"


class Compared(Enum):
    """The part of a row in which duplicates are looked for."""

    both = "both"
    prompt = "prompt"
    answer = "answer"


RULES: Mapping[str, Action] = {
    "empty": Action.drop,
    "copied_prompt": Action.drop,
    "repetition": Action.drop,
    "short": Action.count,
    "cut_off": Action.count,
    "marker": Action.count,
    "placeholder": Action.count,
    "refusal": Action.count,
    "boilerplate": Action.count,
    "annotation": Action.count,
    "equation": Action.count,
    "open_fence": Action.count,
    "code": Action.count,
    "json": Action.count,
}
"""Quality rules of posttrain with the actions they have when a recipe names none."""


@dataclass(kw_only=True)
class NearConfig:
    """Rows alike in most of their words."""

    action: Action = Action.drop
    """drop, stop, count or ignore."""
    threshold: float = number(0.8, above=0, most=1)
    """Least Jaccard similarity of two rows' groups of three words, in lower case."""
    over: Compared = Compared.both
    """The compared text: both, prompt or answer; for exact duplicates as well."""


@dataclass(kw_only=True)
class ContaminationConfig:
    """Rows that hold documents of this run's gates."""

    action: OnContamination = OnContamination.drop
    """drop, stop, warn or ignore."""


class Choice(Enum):
    """Choice of some rows among many: in turn from clusters of topics, or those most like all the others."""

    spread = "spread"
    cover = "cover"


@dataclass(kw_only=True)
class BalanceConfig:
    """Rows left out so that the others are in balance; judged last, the rows with the fewest findings stay."""

    longest: int | None = number(None, least=1)
    """Most words of a row; longer ones are left out."""
    per_source: int | None = number(None, least=1)
    """Most rows of one source."""
    rows: int | None = number(None, least=1)
    """Rows chosen from all that are left."""
    choose: Choice = Choice.spread
    """Choice of those rows: spread (in turn from clusters of words) or cover (those most like all others)."""


@dataclass(kw_only=True)
class PrepareConfig:
    """Preparation of a stage's records before they are weighted and trained."""

    enabled: bool = True
    """False trains every row as it is."""
    exact: Action = Action.drop
    """Rows equal to another but for case and spaces: drop, stop, count or ignore."""
    near: NearConfig = field(default_factory=NearConfig)
    """Rows alike in most of their words."""
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    """Rows that hold documents of this run's gates."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Caps of length and source, and a sample of N rows."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Actions by rule, such as refusal: drop; rules and their defaults are in docs/data.md."""


def rule_actions(config: PrepareConfig, filters: Iterable[str]) -> dict[str, Action]:
    """Return the action of every rule, posttrain's first; a plugin's filter counts unless the recipe says otherwise."""
    known = {**RULES, **{name: Action.count for name in filters if name not in RULES}}
    return {name: _action(config.rules[name]) if name in config.rules else action for name, action in known.items()}


def rule_problems(config: PrepareConfig, filters: Iterable[str]) -> Sequence[tuple[str, str, Iterable[str]]]:
    """Return the wrong entries of ``rules``: the setting, what is wrong, and the options."""
    known = [*RULES, *filters]
    found: list[tuple[str, str, Iterable[str]]] = []
    for name, value in config.rules.items():
        if name not in known:
            found.append((f"rules.{name}", f"there is no rule {name}", known))
        elif _given(value) not in (options := [each.value for each in Action]):
            found.append((f"rules.{name}", f"{value!r} is no action", options))
    return found


def _given(value: Any) -> Any:
    """Return the text of an action, given alone or as ``{action: drop}``."""
    return value["action"] if isinstance(value, Mapping) and set(value) == {"action"} else value


def _action(value: Any) -> Action:
    return Action(_given(value))
