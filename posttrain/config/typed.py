"""Nodes of a composed recipe as typed dataclasses, with a Problem for every missing, misspelt or mistyped value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from posttrain.config.expansion import leaves
from posttrain.config.explain import readable
from posttrain.config.replay import Replay
from posttrain.config.schema import GateConfig, GateTask, Role, Source
from posttrain.errors import Problem, nearest, suggest
from posttrain.host.plugins import Host

NO_VALUE = "has no value"
PATHS = {
    "adapter", "baseline", "chat_template", "data", "eval_data", "gate_data", "junit", "markdown", "output_root",
    "path", "questions", "replay", "start_from", "task",
}  # fmt: skip
"""Settings that name a file, a folder, or something on the hub."""
NAMES = {"cluster", "filter", "metric", "model", "revision", "split", "subset"}
"""Settings that name something else."""
LAUNCH = "launch"
"""Node of which every setting names something."""


def check_resolved(config: DictConfig, keys: Iterable[str]) -> list[Problem]:
    """Return a Problem for every missing value, dangling interpolation and wrong type below ``keys`` of the top."""
    problems = []
    raw: Any = OmegaConf.to_container(config, resolve=False)
    for path in (path for key in keys for path in _leaves(raw[key], key)):
        try:
            OmegaConf.select(config, path, throw_on_missing=True, throw_on_resolution_failure=True)
        except OmegaConfBaseException as error:
            problems.append(_unresolved_problem(config, path, error))
    return problems


def empty_names(config: DictConfig, keys: Iterable[str]) -> list[Problem]:
    """Return a Problem for every empty text below ``keys`` where something, most often a file, is to be named."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    texts = ((path, value) for key in keys for path, value in leaves({key: raw[key]}) if isinstance(value, str))
    return [
        Problem(where=path, what="is empty", fix=f"Give {path}={kind}, or leave it out")
        for path, value in texts
        if not value.strip() and (kind := _named_by(path))
    ]


def _named_by(path: str) -> str:
    """Return PATH or VALUE for a setting that names a file or something else; nothing for one that names nothing."""
    first, setting = path.split(".")[0], _setting(path)
    if not PATHS.isdisjoint({first, setting}):
        return "PATH"
    return "VALUE" if first == LAUNCH or setting in NAMES else ""


def _setting(path: str) -> str:
    """Return the last name of a dotted path, whose numbers count entries of a list."""
    return next((name for name in reversed(path.split(".")) if not name.isdecimal()), path)


def undeclared(config: DictConfig, keys: Iterable[str]) -> list[Problem]:
    """Return a Problem for every key of a typed node below ``keys`` that its type lacks: ``++`` adds any."""
    return [
        Problem(where=path, what=f"unknown key {path!r}", fix=suggest(path.rpartition(".")[2], known))
        for key in keys
        for path, known in _undeclared(config._get_node(key), key)
    ]


def _undeclared(node: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or node._is_interpolation():
        return
    kind = OmegaConf.get_type(node)
    known = [each.name for each in fields(kind)] if isinstance(kind, type) and is_dataclass(kind) else None
    for key in map(str, node):
        if known is not None and key not in known:
            yield f"{path}.{key}", known
        else:
            yield from _undeclared(node._get_node(key), f"{path}.{key}")


def without_results(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems without the missing values that are missing because their keys are misspelt."""
    found = list(problems)
    fixes = [each.fix for each in found]
    return [
        each
        for each in found
        if each.what != NO_VALUE or not any(fix.startswith(f"Did you mean {each.where}?") for fix in fixes)
    ]


def _unresolved_problem(config: DictConfig, path: str, error: OmegaConfBaseException) -> Problem:
    """Name the value, and the key it is interpolated from: that one is to be given."""
    parent, _, leaf = path.rpartition(".")
    raw = OmegaConf.to_container(OmegaConf.select(config, parent), resolve=False) if parent else None
    value = raw.get(leaf) if isinstance(raw, dict) else None
    source = value[2:-1] if isinstance(value, str) and value.startswith("${") else None
    where = f"{path} (from {source})" if source else path
    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        return Problem(where=where, what=NO_VALUE, fix=f"Give {source or path}=VALUE")
    return Problem(where=where, what=readable(str(error)))


def _leaves(node: Any, path: str) -> Iterator[str]:
    """Yield the dotted paths of the values in the plain ``node`` at ``path``."""
    yield from (f"{path}.{key}" for key, _ in leaves(node)) if isinstance(node, dict | list) else (path,)


def conform(kind: type, value: Any, where: str, problems: list[Problem]) -> Any:
    """Return ``value`` as the dataclass ``kind``, or None; add every wrong key and type to ``problems``."""
    schema = OmegaConf.structured(kind)
    known = [str(key) for key in schema]
    if not isinstance(value, Mapping):
        problems.append(Problem(where=where, what=f"must be a mapping, not {value!r}", fix=f"Keys: {', '.join(known)}"))
        return None
    sound, misspelt = True, set()
    one_by_one: Mapping[Any, Any] = {}
    try:
        schema.merge_with(value)
    except OmegaConfBaseException:
        schema, one_by_one = OmegaConf.structured(kind), value  # so that every wrong key is found
    for key, item in one_by_one.items():
        try:
            schema = OmegaConf.merge(schema, {key: item})
        except OmegaConfBaseException as error:
            sound = False
            unknown = str(key) not in known
            what = f"unknown key {key!r}" if unknown else readable(str(error))
            fix = suggest(str(key), known) if unknown else ""
            misspelt |= {nearest(str(key), known)} if unknown else set()
            problems.append(Problem(where=f"{where}.{key}", what=what, fix=fix))
    for key in sorted(OmegaConf.missing_keys(schema) - set(map(str, value)) - misspelt):
        sound = False
        problems.append(Problem(where=f"{where}.{key}", what=NO_VALUE, fix=f"Give {where}.{key}"))
    return OmegaConf.to_object(schema) if sound else None


def conform_sources(setting: str, data: Any, problems: list[Problem]) -> tuple[Source, ...]:
    """Return the sources that a path, a source or a list of either names; add what is wrong to ``problems``."""
    entries = data if isinstance(data, list) else [data]
    sources = []
    for index, entry in enumerate(entries):
        where = f"{setting}[{index}]" if isinstance(data, list) else setting
        given = _asked_of_parent({"path": entry} if isinstance(entry, str) else entry)
        source = conform(Source, given, where, problems)
        if source is not None:
            sources.append(source)
    if not sources and not problems:
        problems.append(Problem(where=setting, what="names no source", fix=f"Give {setting}=FILE"))
    return tuple(sources)


def conform_replay(where: str, given: Any, problems: list[Problem]) -> Replay | None:
    """Return the replayed source of a stage, None for none; add what is wrong to ``problems``."""
    if given is None:
        return None
    replay: Replay | None = conform(Replay, {"path": given} if isinstance(given, str) else given, where, problems)
    if replay is None:
        return None
    wrong = [Problem(where=f"{where}{key}", what=what) for key, what in replay.problems()]
    problems += wrong
    return None if wrong else replay


def _asked_of_parent(given: Any) -> Any:
    """Return a source with its questions in the place of its path, where the stage's parent answers them."""
    asked = given.get("on_policy") if isinstance(given, Mapping) else None
    if not isinstance(asked, Mapping) or "questions" not in asked or "path" in given:
        return given
    return {**given, "path": asked["questions"]}


def conform_gate_tasks(where: str, gate: GateConfig, host: Host, problems: list[Problem]) -> dict[str, GateTask]:
    """Return the typed tasks of a gate, those of plugins with their files; add what is wrong to ``problems``."""
    if gate.enabled and not gate.tasks:
        fix = f"Choose a gate: gate@{where}=NAME (or +gate@{where}=NAME); gate none promotes unseen"
        problems.append(Problem(where=where, what="asks for no task", fix=fix))
    problems += [Problem(where=f"{where}.{key}", what=what) for key, what in gate.problems()]
    conformed = {key: conform(GateTask, value, f"{where}.tasks.{key}", problems) for key, value in gate.tasks.items()}
    tasks = {key: task for key, task in conformed.items() if task is not None}
    problems += [
        Problem(where=f"{where}.tasks.{name}.{key}", what=what)
        for name, task in tasks.items()
        for key, what in task.problems()
    ]
    if gate.pooled_max_drop is not None and not any(task.role is Role.guard for task in tasks.values()):
        problems.append(Problem(where=f"{where}.pooled_max_drop", what="the gate has no guard to pool"))
    return {name: _with_file(name, task, host) for name, task in tasks.items()}


def _with_file(name: str, task: GateTask, host: Host) -> GateTask:
    """Return a plugin's task with the path of its file in place of its name."""
    path = host.tasks.get(task.task or name)
    return task if path is None else replace(task, task=str(path))
