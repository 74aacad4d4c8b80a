"""Errors of Hydra and OmegaConf in the user's terms: the override or key, the nearest valid name, the fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from posttrain.config.launch import LaunchConfig
from posttrain.config.schema import ROOT, GateTask, ModelConfig, Source
from posttrain.config.settings_file import GROUPS, Reading
from posttrain.errors import PluginFailed, Problem, nearest, suggest
from posttrain.host.plugins import Host

TYPE_ERRORS = {
    r"Value (.+) of type '\w+' could not be converted to Float": r"\1 is not a number",
    r"Value (.+) of type '\w+' could not be converted to Integer": r"\1 is not an integer",
    r"Value (.+) is not a valid bool \(type \w+\)": r"\1 is neither true nor false",
    r"field '(.+)' is not Optional": r"\1 cannot be null",
    r"Invalid type assigned: \w+ is not a subclass of \w+\. value: (.+)": r"'\1' is no mapping of settings",
    r"\w+ \(DictConfig\) does not support deletion": "a setting cannot be taken out",
    r"Unsupported interpolation type (.+)": r"a recipe cannot use the resolver '\1'",
    r"Invalid value ('(?:float16|fp16|half)'), expected one of \[(.+)\]": (
        r"\1 is not one of \2: it loses small gradients unless the loss is scaled, which is not done"
    ),
    r"Invalid value (.+), expected one of \[(.+)\]": r"\1 is not one of \2",
}
"""Messages of OmegaConf by pattern, in plain English."""
NODES = {"model": ModelConfig, "data": Source, "launch": LaunchConfig}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A problem and its cause; composing without the cause finds the next problem."""

    problem: Problem
    override: str | None = None
    recipe_key: str | None = None
    instead: str | None = None
    """The override in Hydra's syntax, when that is all it lacks."""
    fatal: bool = False


def fault(
    error: BaseException, overrides: Sequence[str], host: Host, choice: str = "recipe", reading: Reading | None = None
) -> Fault:
    """Explain an error raised while composing the ``choice``, a recipe or a gate, of the files in ``reading``.

    Raises PluginFailed for a failed plugin that the recipe needs.
    """
    reading = reading or Reading()
    if isinstance(error, OverrideParseException):
        return _unreadable_word(str(error.override), str(error.message), overrides, choice)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error, overrides, host, reading)
    if (twice := _chosen_twice(str(error), overrides)) is not None:
        return twice
    reason = error.__cause__ or error.__context__
    cause = reason if isinstance(reason, OmegaConfBaseException) else None
    override = _culprit(str(error), overrides)
    if override is not None:
        adds = _adds_to_a_gate_task(override, cause) or _adds_to_a_source(override, cause)
        instead = f"++{override}" if adds else None
        problem = _place_problem(override, str(error), reading) or _override_problem(override, cause, str(error), host)
        return Fault(problem=problem, override=override, instead=instead)
    if cause is not None and cause.full_key:
        key = str(cause.full_key)
        return Fault(problem=_key_problem(_in_recipe(key, reading), key, cause, host), recipe_key=key)
    return Fault(problem=_composition_problem(str(error), overrides), fatal=True)


def _in_recipe(key: str, reading: Reading) -> str:
    """Return the place of a key in the recipe: file and key as a plain recipe has it, or the key of the full form."""
    given = reading.origins.get(key)
    paths = [path for name, (path, _) in reading.files.items() if name.startswith("recipe/")]
    return f"recipe: {key}" if given is None or not paths else f"{paths[0]}: {given}"


def _unreadable_word(word: str, message: str, overrides: Sequence[str], choice: str) -> Fault:
    """Explain a word that is no override: a flag, a word without a value, or one that lacks quotes."""
    fix = "Write key=value; quote lists and values with spaces, such as 'stages=[sft,dpo]'"
    if word.startswith("-"):
        fix = "posttrain COMMAND --help shows the flags of a command"
        return Fault(problem=Problem(where=word, what="is no flag of this command", fix=fix), override=word)
    if "=" in word:
        return Fault(problem=Problem(where=word, what=f"cannot be read: {readable(message)}", fix=fix), override=word)
    chosen = any(each.startswith(f"{choice}=") for each in overrides)
    if not chosen:  # the word may be its name
        options = _options(choice)
        name = word if word in options else nearest(word, options)
        fix = (
            f"Did you mean {choice}={name}? " if name and word != choice else f"Choose a {choice} with {choice}=NAME. "
        )
        fix += f"Available: {', '.join(options)}"
    return Fault(problem=Problem(where=word, what="is not key=value", fix=fix), override=word, fatal=not chosen)


def _place_problem(override: str, text: str, reading: Reading) -> Problem | None:
    """Explain a group or a place, as in ``gate@sft.gate``, that is not there; return None for any other error."""
    key, places = _key(override), reading.places()
    group, value = _group(override), _value(override) or "NAME"
    if "@" not in key or not re.search(r"No match in the defaults list|Could not override|does not exist", text):
        return None
    if group not in GROUPS:
        return Problem(where=override, what=f"no group of options is named {group!r}", fix=suggest(group, GROUPS))
    close = nearest(key, places, cutoff=0.85)
    mended = f"~{close}" if override.startswith("~") else f"{close}={value}"
    fix = f"Did you mean {mended}? " if close else ""
    fix += f"Chosen by the recipe: {', '.join(places) or 'nothing'}"
    if not close and not override.startswith(("+", "~")):
        fix += f"\n    To choose one more, add a +: +{key}={value}"
    return Problem(where=override, what=f"the recipe has no {key}", fix=fix)


def _chosen_twice(text: str, overrides: Sequence[str]) -> Fault | None:
    """Explain a word that adds a group twice; return None for any other error."""
    match = re.search(r"Multiple values for (\S+)\. |^(\S+) appears more than once", text)
    choice = match and (match[1] or match[2])
    override = next((word for word in overrides if word.startswith("+") and _key(word) == choice), None)
    if override is None:
        return None
    fix = "Leave out the + to replace the first"
    if _group(override) == "stage":
        kind = _value(override)
        name = kind if choice != f"stage@{kind}" else f"{kind}2"
        fix += f", or give the second a name of its own: +stage@{name}={kind}"
    problem = Problem(where=override, what=f"the recipe already has {choice}", fix=fix)
    return Fault(problem=problem, override=override)


def _adds_to_a_gate_task(override: str, cause: OmegaConfBaseException | None) -> bool:
    """Check for a setting of a known task that the gate's file does not name: Hydra knows only those it names."""
    match = re.fullmatch(r"(?:\w+\.)?gate\.tasks\.[^.]+\.(\w+)", _key(override))
    exists = cause is not None and isinstance(cause.parent_node, DictConfig) and "role" in cause.parent_node
    return bool(match and exists and match[1] in {field.name for field in fields(GateTask)})


def _adds_to_a_source(override: str, cause: OmegaConfBaseException | None) -> bool:
    """Check for a setting of a stage's source that its recipe does not give: Hydra knows only those it gives.

    A misspelt one is added as well, and named where the source is typed.
    """
    below = re.fullmatch(r"\w+\.(?:eval_)?data\.\w+(?:\.\w+)?", _key(override))
    return below is not None and cause is not None and str(cause.full_key).count(".") >= 2


def _missing_option(error: MissingConfigException, overrides: Sequence[str], host: Host, reading: Reading) -> Fault:
    """Explain an unknown recipe, model, gate or kind of stage."""
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = [str(name) for name in error.options or _options(group)]
    override = next((o for o in overrides if _value(o) == option and _group(o) == group), None)
    fix = suggest(option, options) + _own_files(group)
    _require_plugins(group, option, override, host)
    fix += "".join(f"\n    note: {info}" for info in (*host.failures(), *host.blocked()))
    asks = re.match(r"In '(.+?)'", str(error))
    recipes = [file for name, file in reading.files.items() if name.startswith("recipe/")]
    file = reading.files.get(asks[1] if asks else "") or next(iter(recipes), None)
    where = override or (f"recipe: {group}" if file is None else f"{file[0]}: {group}")
    problem = Problem(where=where, what=f"no {group or 'config'} named {option!r}", fix=fix)
    return Fault(problem=problem, override=override, fatal=group == "recipe" or _key(override or "") == "gate")


def _require_plugins(group: str, option: str, override: str | None, host: Host) -> None:
    """Raise PluginFailed when a plugin that failed to load is the likely cause of a missing option."""
    failures = host.failures()
    culprits = [info for info in failures if info.name == option]
    if culprits:
        raise PluginFailed(f"no {group} is named {option!r}: {culprits[0]}")
    if failures and group == "stage" and override is None:  # not mistyped: the recipe asks for it
        lines = "".join(f"\n    {info}" for info in failures)
        raise PluginFailed(f"no stage is named {option!r}: a plugin that failed to load may have it{lines}")


def _own_files(group: str) -> str:
    """Return the place where a file of the user's own is found."""
    if group == "recipe":
        return "\n    Your own recipes are read from ./recipes/NAME.yaml"
    in_file = group in ("gate", "model", "variant", "tracker", "launch")
    several = "launches" if group == "launch" else f"{group}s"
    return f"\n    Your own {several} are read from DIR/{group}/NAME.yaml with --config-dir DIR" if in_file else ""


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)


def _override_problem(override: str, cause: OmegaConfBaseException | None, text: str, host: Host) -> Problem:
    key = _key(override)
    if isinstance(cause, ConfigKeyError) or "Could not override" in text:
        return _key_problem(override, key, cause, host)
    if match := re.search(r"Could not append to config\. An item is already at '(.+?)'", text):
        return Problem(
            where=override, what=f"{match[1]} already exists", fix=f"Leave out the +: {override.lstrip('+')}"
        )
    if "Ambiguous value" in text or "requires --multirun" in text:
        fix = "A list is written [a,b]; to run every value, add --multirun"
        return Problem(where=override, what="has several values", fix=fix)
    reason = readable(str(cause.msg if cause is not None and cause.msg else text))
    if key == "data" and "ListConfig" in reason:
        fix = f"Give several sources to a stage: sft.{override.lstrip('+')}"
        return Problem(where=override, what="the data of a recipe is one source", fix=fix)
    return Problem(where=override, what=reason, fix=_expected(key, host))


def _key_problem(where: str, key: str, cause: OmegaConfBaseException | None, host: Host) -> Problem:
    """Explain an unknown key, or a value of the wrong type at a known one."""
    inner = str(cause.full_key) if cause is not None and str(cause.full_key).startswith(f"{key}.") else None
    if inner is not None and key.rpartition(".")[2] in ("data", "eval_data"):  # sources have no schema to merge into
        what = f"the recipe's {key} has no {inner.removeprefix(f'{key}.')}, and a value in braces adds none"
        return Problem(where=where, what=what, fix=f"Give it by itself: {inner}=VALUE")
    key = inner or key
    if cause is not None and cause.full_key and key.startswith(f"{cause.full_key}."):
        key = str(cause.full_key)  # the keys below it are not known
    parent, _, leaf = key.rpartition(".")
    known = settings_of(parent, host, cause)
    if parent == "tracker" and not known:
        options = [option for option in _options("tracker") if option != "none"]
        return Problem(where=where, what="no tracker is chosen", fix=f"Add tracker=NAME. {suggest('', options)}")
    if leaf in known and cause is not None and not isinstance(cause, ConfigKeyError):
        return Problem(where=where, what=readable(str(cause.msg)), fix=_expected(key, host))
    close = nearest(leaf, known)
    if not parent:
        close = _of_a_stage(leaf, known, host) or close or _of_a_stage(leaf, known, host, cutoff=0.75)
    prefix = f"{parent}." if parent else ""
    fix = (f"Did you mean {prefix}{close}? " if close else "") + f"Available: {', '.join(known)}"
    if re.fullmatch(r"(\w+\.)?gate\.tasks\.[^.]+", key) and "=" in where:
        fix += f"\n    For a new task, add a +: +{where.lstrip('+')}"
    return Problem(where=where, what=f"unknown key {key!r}", fix=fix)


def _of_a_stage(leaf: str, known: Sequence[str], host: Host, cutoff: float = 1.0) -> str | None:
    """Return the dotted name of a stage's setting that is given without the stage, as a plain recipe writes it.

    Below a ``cutoff`` of 1 that of the setting most like it.
    """
    stages = [name for name in known if name in host.stages]
    if cutoff < 1:
        names = {field.name for name in stages for field in fields(host.stages[name].config)} | {"rank"}
        leaf = nearest(leaf, sorted(names), cutoff) or leaf
    owners = [name for name in stages if leaf in {field.name for field in fields(host.stages[name].config)}]
    if leaf == "rank":
        return f"{stages[0]}.lora.r" if stages else None
    if leaf == "gate" and owners:
        return f"gate@{owners[0]}.gate=NAME"
    return f"{owners[0]}.{leaf}" if owners else None


def _composition_problem(text: str, overrides: Sequence[str]) -> Problem:
    if match := re.search(r"You must specify '(\w+)'", text):
        group = match[1]
        options = f"Available: {', '.join(_options(group))}"
        close = nearest(group, map(_key, overrides))
        word = next((each for each in overrides if close is not None and _key(each) == close), None)
        if word is None:
            return Problem(where=group, what=f"no {group} chosen", fix=f"Add {group}=NAME. {options}")
        fix = f"Did you mean {group}={_value(word) or 'NAME'}? {options}"
        return Problem(where=word, what=f"{close!r} is no key, and no {group} is chosen", fix=fix)
    return Problem(where="recipe", what=readable(text), fix="posttrain list shows the options")


def settings_of(path: str, host: Host, cause: OmegaConfBaseException | None = None) -> list[str]:
    """Return the names of the settings at a dotted path: of the node in ``cause``, of the root, or of a typed node."""
    node = cause.parent_node if cause is not None and cause.parent_node is not None else None
    if node is not None:
        keys = [str(key) for key in node]
        return [key for key in keys if key != "hydra"]
    if not path:
        return [*ROOT, *host.stages, *host.own_nodes()]
    declared: dict[str, Any] = {**host.stages, **host.settings}
    kind: Any = NODES.get(path.split(".")[0]) or (declared[path].config if path in declared else None)
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _expected(key: str, host: Host) -> str:
    root, leaf = key.split(".")[0], key.rpartition(".")[2]
    if leaf == "gate":
        return f"Choose one by its name: gate@{key}=NAME. Available: {', '.join(_options('gate'))}"
    return f"posttrain list {root} shows its settings" if root in (*host.stages, *host.own_nodes(), "launch") else ""


def _culprit(text: str, overrides: Iterable[str]) -> str | None:
    """Return the longest override that an error message quotes."""
    quoted = [o for o in overrides if o in text or f"'{_key(o)}'" in text or f"'{o.lstrip('+~')}'" in text]
    return max(quoted, key=len, default=None)


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]


def _value(override: str) -> str:
    return override.partition("=")[2].strip("'\"")


def _group(override: str) -> str:
    return _key(override).split("@")[0]


def readable(message: str) -> str:
    """Return the first line of an error of OmegaConf; one about a type without the terms of OmegaConf."""
    first = next((line.strip() for line in message.splitlines() if line.strip()), "cannot be composed")
    for pattern, text in TYPE_ERRORS.items():
        if match := re.match(pattern, first):
            return match.expand(text)
    return first
