"""Says what Hydra found wrong in the user's terms: which override or key, the nearest valid name, how to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from posttrain.config.schema import GateTask, ModelConfig, Source, TrackerConfig
from posttrain.errors import PluginFailed, Problem, nearest, suggest
from posttrain.host.plugins import Host

ROOT = (
    "seed", "output_root", "stages", "start_from", "model", "data", "gate_data", "tracker", "variant", "plugin_timeout",
)  # fmt: skip
"""Keys at the top level of every recipe besides its stages."""
FLAGS = ("--all", "--config-dir", "--json", "--multirun", "--update-baseline")
"""Of the commands that compose."""
NODES = {"model": ModelConfig, "data": Source, "tracker": TrackerConfig}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A problem and what causes it, so that composing can go on without the cause."""

    problem: Problem
    override: str | None = None
    recipe_key: str | None = None
    instead: str | None = None
    """The override as the user meant it, when there is nothing wrong with it but Hydra's syntax."""
    fatal: bool = False


def fault(error: BaseException, overrides: Sequence[str], host: Host) -> Fault:
    """What ``error``, raised while composing, means."""
    if isinstance(error, OverrideParseException):
        return Fault(problem=_unreadable_word(str(error.override), str(error.message)), override=error.override)
    if isinstance(error, (yaml.YAMLError, UnicodeDecodeError)):
        return Fault(problem=_unreadable_file(error, overrides), fatal=True)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error, overrides, host)
    if (twice := _chosen_twice(str(error), overrides)) is not None:
        return twice
    reason = error.__cause__ or error.__context__
    cause = reason if isinstance(reason, OmegaConfBaseException) else None
    override = _culprit(str(error), overrides)
    if override is not None:
        instead = f"++{override}" if _adds_to_a_gate_task(override, cause) else None
        return Fault(problem=_override_problem(override, cause, str(error), host), override=override, instead=instead)
    if cause is not None and cause.full_key:
        where = f"recipe: {cause.full_key}"
        return Fault(problem=_key_problem(where, str(cause.full_key), cause, host), recipe_key=str(cause.full_key))
    return Fault(problem=_composition_problem(str(error), host), fatal=True)


def _unreadable_word(word: str, message: str) -> Problem:
    """A word that Hydra cannot take for an override: a flag, a word without a value, or one to be quoted."""
    if word.startswith("-"):
        close = nearest(word, FLAGS)
        fix = (f"Did you mean {close}? " if close else "") + "posttrain --help shows which command takes which flags"
        return Problem(where=word, what="is no flag of this command", fix=fix)
    fix = "Write key=value; quote lists and values with spaces, such as 'stages=[sft,dpo]'"
    what = f"cannot be read: {_first_line(message)}" if "=" in word else "is not key=value"
    return Problem(where=word, what=what, fix=fix)


def _unreadable_file(error: yaml.YAMLError | UnicodeDecodeError, overrides: Sequence[str]) -> Problem:
    """A file of a group that is no YAML: named where the parser knows it, else by what chose it."""
    mark = getattr(error, "problem_mark", None)
    chosen = next((o for o in reversed(overrides) if _group(o) in ("recipe", "gate", "variant")), "recipe")
    where = chosen if mark is None else f"{mark.name}:{mark.line + 1}"
    return Problem(where=where, what=f"is not sound YAML: {' '.join(str(error).split())}")


def _chosen_twice(text: str, overrides: Sequence[str]) -> Fault | None:
    """A word of the command line that adds what the recipe has already; None for any other error."""
    match = re.search(r"Multiple values for (\S+)\. |^(\S+) appears more than once", text)
    choice = match and (match[1] or match[2])
    override = next((word for word in overrides if word.startswith("+") and _key(word) == choice), None)
    if override is None:
        return None
    fix = "Leave out the + to have it in the other one's place"
    if _group(override) == "stage":
        kind = _value(override)
        name = kind if choice != f"stage@{kind}" else f"{kind}2"
        fix += f", or give the second a name of its own: +stage@{name}={kind}"
    problem = Problem(where=override, what=f"the recipe has {choice} already", fix=fix)
    return Fault(problem=problem, override=override)


def _adds_to_a_gate_task(override: str, cause: OmegaConfBaseException | None) -> bool:
    """Whether a setting is given that the gate leaves at its default: Hydra only knows those that its file names."""
    match = re.fullmatch(r"(?:\w+\.)?gate\.tasks\.[^.]+\.(\w+)", _key(override))
    exists = cause is not None and isinstance(cause.parent_node, DictConfig) and "role" in cause.parent_node
    return bool(match and exists and match[1] in {field.name for field in fields(GateTask)})


def _missing_option(error: MissingConfigException, overrides: Sequence[str], host: Host) -> Fault:
    """A group has no such option: an unknown recipe, model, gate or kind of stage."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = [str(name) for name in error.options or _options(group)]
    override = next((o for o in overrides if _value(o) == option and _group(o) == group), None)
    fix = suggest(option, options) + _of_your_own(group)
    _require_plugins(group, option, override, host)
    fix += "".join(f"\n    note: {info}" for info in (*host.failures(), *host.blocked()))
    problem = Problem(where=override or f"recipe: {group}", what=f"no {group or 'config'} named {option!r}", fix=fix)
    return Fault(problem=problem, override=override, fatal=group == "recipe" or _key(override or "") == "gate")


def _require_plugins(group: str, option: str, override: str | None, host: Host) -> None:
    """Raise PluginFailed where a plugin that could not be loaded is what is missing, as far as can be told."""
    failures = host.failures()
    culprits = [info for info in failures if info.name == option]
    if culprits:
        raise PluginFailed(f"no {group} is named {option!r}: {culprits[0]}")
    if failures and group == "stage" and override is None:  # no slip of the user's: the recipe asks for it
        lines = "".join(f"\n    {info}" for info in failures)
        raise PluginFailed(f"no stage is named {option!r}: it may be that of a plugin that is not there{lines}")


def _of_your_own(group: str) -> str:
    """Where a file of the user's would have been found."""
    if group == "recipe":
        return "\n    One of your own is the file recipes/NAME.yaml, seen from here"
    in_file = group in ("gate", "model", "variant", "tracker")
    return f"\n    One of your own is the file {group}/NAME.yaml in DIR, with --config-dir DIR" if in_file else ""


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)


def _override_problem(override: str, cause: OmegaConfBaseException | None, text: str, host: Host) -> Problem:
    key = _key(override)
    if isinstance(cause, ConfigKeyError) or "Could not override" in text:
        return _key_problem(override, key, cause, host)
    if match := re.search(r"Could not append to config\. An item is already at '(.+?)'", text):
        return Problem(
            where=override, what=f"{match[1]} exists already", fix=f"Leave out the +: {override.lstrip('+')}"
        )
    if "Ambiguous value" in text or "requires --multirun" in text:
        fix = "A list is written [a,b]; to run every value, add --multirun"
        return Problem(where=override, what="has several values", fix=fix)
    reason = _first_line(str(cause.msg if cause is not None and cause.msg else text))
    return Problem(where=override, what=reason, fix=_expected(key, host))


def _key_problem(where: str, key: str, cause: OmegaConfBaseException | None, host: Host) -> Problem:
    """Either no such key, or a value of the wrong type at a key that exists."""
    if cause is not None and cause.full_key and key.startswith(f"{cause.full_key}."):
        key = str(cause.full_key)  # below it nothing can be known
    parent, _, leaf = key.rpartition(".")
    known = settings_of(parent, host, cause)
    if leaf in known and cause is not None and not isinstance(cause, ConfigKeyError):
        return Problem(where=where, what=_first_line(str(cause.msg)), fix=_expected(key, host))
    close = nearest(leaf, known)
    prefix = f"{parent}." if parent else ""
    fix = (f"Did you mean {prefix}{close}? " if close else "") + f"Available: {', '.join(known)}"
    return Problem(where=where, what=f"unknown key {key!r}", fix=fix)


def _composition_problem(text: str, host: Host) -> Problem:
    if match := re.search(r"You must specify '(\w+)'", text):
        group = match[1]
        return Problem(where=group, what=f"no {group} chosen", fix=f"Add {group}=NAME. {suggest('', _options(group))}")
    return Problem(where="recipe", what=_first_line(text), fix="posttrain list shows what is available")


def settings_of(path: str, host: Host, cause: OmegaConfBaseException | None = None) -> list[str]:
    """Names of the settings at a dotted path: the root's, a typed node's, or those of the node that ``cause`` holds."""
    node = cause.parent_node if cause is not None and cause.parent_node is not None else None
    if node is not None:
        keys = [str(key) for key in node]
        return [key for key in keys if key != "hydra"]
    if not path:
        return [*ROOT, *host.stages]
    kind: Any = NODES.get(path.split(".")[0]) or (host.stages[path].config if path in host.stages else None)
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _expected(key: str, host: Host) -> str:
    return f"posttrain list {key.split('.')[0]} shows its settings" if key.split(".")[0] in host.stages else ""


def _culprit(text: str, overrides: Iterable[str]) -> str | None:
    """The override that an error message quotes."""
    quoted = [o for o in overrides if o in text or f"'{_key(o)}'" in text or f"'{o.lstrip('+~')}'" in text]
    return max(quoted, key=len, default=None)


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]


def _value(override: str) -> str:
    return override.partition("=")[2].strip("'\"")


def _group(override: str) -> str:
    return _key(override).split("@")[0]


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "cannot be composed"
