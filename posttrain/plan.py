"""From a composed recipe to a plan: which stages run in which order with which settings, or everything that is wrong.

Pure: nothing is loaded but the recipe, nothing is written, torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from posttrain.config.compose import Composition
from posttrain.config.explain import ROOT
from posttrain.config.schema import GateConfig, GateTask, ModelConfig, Role, Source, StageConfig, Tracker, TrackerConfig
from posttrain.errors import BadInput, Problem, suggest
from posttrain.host.plugins import Host
from posttrain.stage import Stage

CORE = "sft"
ONCE = "SFT is first and only once"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of the pipeline."""

    name: str
    """Name of its node in the recipe."""
    stage: Stage
    config: StageConfig
    sources: tuple[Source, ...]
    eval_sources: tuple[Source, ...]
    """Sources of the records whose loss is measured and which are not trained."""
    tasks: Mapping[str, GateTask]
    """The gate's tasks, typed."""
    seed: int
    origin: str
    """The plugin that brings the stage, with its version: part of what the stage's result depends on."""

    @property
    def gate(self) -> GateConfig:
        """The gate that decides about the stage's artifact."""
        return self.config.gate


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe will do."""

    recipe: str
    words: tuple[str, ...]
    """The words of the command line that gave it."""
    model: ModelConfig
    steps: tuple[Step, ...]
    tracker: TrackerConfig
    seed: int
    plugin_timeout: float | None
    """Seconds that a plugin may go without a sign of life."""
    output_root: Path
    start_from: Path | None
    resolved: Mapping[str, Any]
    """The recipe with everything resolved, as plain data."""


def make_plan(composition: Composition, host: Host) -> Plan:
    """The plan of a composed recipe. Raises BadInput with every problem found, those of composing included."""
    config, problems = composition.config, list(composition.problems)
    problems += _unknown_nodes(composition, host)
    names, order_problems = _order(config, host)
    problems += order_problems
    used = ["seed", "output_root", "stages", "start_from", "plugin_timeout", "model", "tracker", *names]
    if any(_takes_recipe_data(config[name]) for name in names):
        used.append("data")
    broken = [problem for key in used for problem in unresolved(config, key)]
    if broken or problems:
        raise BadInput(problems + broken)
    model = _typed(config.model)
    steps = [_step(name, config, host, problems) for name in names]
    problems += [*_number_problems(config), *_timeout_problems(config), *_tracker_problems(config)]
    plan = Plan(
        recipe=composition.recipe,
        words=composition.words,
        model=model,
        steps=tuple(step for step in steps if step is not None),
        tracker=_typed(config.tracker),
        seed=config.seed,
        plugin_timeout=config.plugin_timeout,
        output_root=Path(str(config.output_root)),
        start_from=Path(str(config.start_from)) if config.start_from else None,
        resolved={key: _plain(config[key]) for key in used},
    )
    for answer in host.hook.check_plan(plan=plan):
        problems += answer
    if problems:
        raise BadInput(problems)
    return plan


def stage_nodes(config: DictConfig) -> list[str]:
    """Top-level nodes that are typed by a stage's config, in the order of the recipe."""
    types = {str(key): OmegaConf.get_type(config, str(key)) for key in config}
    return [key for key, kind in types.items() if isinstance(kind, type) and issubclass(kind, StageConfig)]


def _unknown_nodes(composition: Composition, host: Host) -> list[Problem]:
    known = {*ROOT, *stage_nodes(composition.config), *composition.removed}
    return [
        Problem(
            where=f"recipe: {key}",
            what=f"{key!r} is neither a setting nor a stage of this recipe",
            fix=f"For a stage, add - /stage@{key}: KIND to the defaults. {suggest(key, [*ROOT, *host.stages])}",
        )
        for key in map(str, composition.config)
        if key not in known
    ]


def _order(config: DictConfig, host: Host) -> tuple[list[str], list[Problem]]:
    """Names of the stages in running order, and what is wrong with it."""
    nodes = stage_nodes(config)
    chosen = config.stages
    if chosen is not None and not isinstance(chosen, ListConfig):
        return [], [Problem(where="stages", what=f"must be a list, not {chosen!r}", fix="'stages=[sft,dpo]'")]
    names = nodes if chosen is None else [str(name) for name in chosen]
    problems = [
        Problem(
            where="stages",
            what=f"the recipe has no stage {name!r}",
            fix=f"Add it: +stage@{name}={name}" if name in host.stages else suggest(name, nodes),
        )
        for name in names
        if name not in nodes
    ]
    problems += [
        Problem(
            where="stages",
            what=f"{name!r} occurs twice",
            fix=ONCE if name == CORE else f"Give the second a name: +stage@{name}2={name}",
        )
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if problems:
        return [], problems
    kinds = [str(OmegaConf.select(config, f"{name}.kind")) for name in names]
    return names, _core_problems(names, kinds, config.start_from, host)


def _core_problems(names: list[str], kinds: list[str], start_from: str | None, host: Host) -> list[Problem]:
    """SFT comes first and once, unless the pipeline starts from an artifact that has been through it."""
    if start_from and CORE in kinds:
        return [Problem(where="start_from", what="the pipeline runs SFT itself", fix="Leave out start_from, or sft")]
    if not start_from and (not kinds or kinds[0] != CORE):
        what = f"the pipeline starts with {names[0]!r}" if names else "the recipe has no stages"
        fix = (
            "SFT is mandatory and first: put sft first, or give start_from=DIR of an artifact that has been through it"
        )
        return [Problem(where="stages", what=what, fix=fix)]
    late = [name for name, kind in list(zip(names, kinds, strict=True))[1:] if kind == CORE]
    return [Problem(where="stages", what=f"{name!r} runs SFT a second time", fix=ONCE) for name in late]


def unresolved(config: DictConfig, key: str) -> list[Problem]:
    """Missing values, dangling interpolations and wrong types below a key."""
    problems = []
    for path in _leaves(config, key):
        try:
            OmegaConf.select(config, path, throw_on_missing=True, throw_on_resolution_failure=True)
        except OmegaConfBaseException as error:
            problems.append(_unresolved_problem(config, path, error))
    return problems


def _unresolved_problem(config: DictConfig, path: str, error: OmegaConfBaseException) -> Problem:
    """A value that is missing, here or where it is taken from, or of the wrong type."""
    parent, _, leaf = path.rpartition(".")
    raw = OmegaConf.to_container(OmegaConf.select(config, parent), resolve=False) if parent else None
    value = raw.get(leaf) if isinstance(raw, dict) else None
    source = value[2:-1] if isinstance(value, str) and value.startswith("${") else None
    where = f"{path} (from {source})" if source else path
    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        return Problem(where=where, what="has no value", fix=f"Give {source or path}=VALUE")
    return Problem(where=where, what=str(error).splitlines()[0])


def _leaves(config: DictConfig, path: str) -> Iterator[str]:
    """Dotted paths of the values below ``path``."""
    node: Any = OmegaConf.to_container(config, resolve=False)
    for part in path.split("."):
        node = node[part]
    yield from _descend(node, path)


def _descend(node: Any, path: str) -> Iterator[str]:
    if not isinstance(node, dict):
        yield path
        return
    for key, value in node.items():
        yield from _descend(value, f"{path}.{key}")


def _takes_recipe_data(node: DictConfig) -> bool:
    given = OmegaConf.is_missing(node, "data") or OmegaConf.is_interpolation(node, "data")
    return not given and node.data is None


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True, enum_to_str=True) if OmegaConf.is_config(value) else value


def _typed(node: DictConfig) -> Any:
    return OmegaConf.to_object(node)


def _step(name: str, config: DictConfig, host: Host, problems: list[Problem]) -> Step | None:
    """One stage with typed settings; what is wrong with them is added to ``problems``."""
    settings: StageConfig = _typed(config[name])
    stage = host.stages[settings.kind]
    with host.calling(stage.name, "problems"):
        problems += [Problem(where=f"{name}.{key}", what=what) for key, what in settings.problems()]
    sources = _sources(f"{name}.data", config.data if settings.data is None else settings.data, problems)
    eval_data = settings.eval_sources()
    eval_sources = () if eval_data is None else _sources(f"{name}.eval_data", eval_data, problems)
    tasks = gate_tasks(f"{name}.gate", settings.gate, host, problems)
    return Step(
        name=name, stage=stage, config=settings, sources=sources, eval_sources=eval_sources, tasks=tasks,
        seed=config.seed, origin=host.origin(stage.name),
    )  # fmt: skip


def _sources(setting: str, data: Any, problems: list[Problem]) -> tuple[Source, ...]:
    """The sources of a stage: from a path, one source, or a list of either."""
    entries = data if isinstance(data, list) else [data]
    sources = []
    for index, entry in enumerate(entries):
        where = f"{setting}[{index}]" if isinstance(data, list) else setting
        given = {"path": entry} if isinstance(entry, str) else entry
        source = _conform(Source, given, where, problems)
        if source is not None:
            sources.append(source)
    if not sources and not problems:
        problems.append(Problem(where=setting, what="names no source", fix=f"Give {setting}=FILE"))
    for source in sources:
        if not 0 < source.weight < inf:
            what = f"weight {source.weight} of {source.path} is not positive and finite"
            problems.append(Problem(where=setting, what=what))
        if source.limit is not None and source.limit < 1:
            problems.append(Problem(where=setting, what=f"limit {source.limit} of {source.path} is not positive"))
    return tuple(sources)


def gate_tasks(where: str, gate: GateConfig, host: Host, problems: list[Problem]) -> dict[str, GateTask]:
    """The tasks of a gate, typed, those of plugins by their files; what is wrong is added to ``problems``."""
    if gate.enabled and not gate.tasks:
        fix = f"Choose a gate: gate@{where}=NAME (or +gate@{where}=NAME); gate none promotes unseen"
        problems.append(Problem(where=where, what="asks for no task", fix=fix))
    problems += [Problem(where=f"{where}.{key}", what=what) for key, what in gate.problems()]
    conformed = {key: _conform(GateTask, value, f"{where}.tasks.{key}", problems) for key, value in gate.tasks.items()}
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
    """A task that a plugin brings is known by its file from here on."""
    path = host.tasks.get(task.task or name)
    return task if path is None else replace(task, task=str(path))


def _conform(kind: type, value: Any, where: str, problems: list[Problem]) -> Any:
    """``value`` as the dataclass ``kind``, every wrong key and type added to ``problems``."""
    schema = OmegaConf.structured(kind)
    known = [str(key) for key in schema]
    if not isinstance(value, Mapping):
        problems.append(Problem(where=where, what=f"must be a mapping, not {value!r}", fix=f"Keys: {', '.join(known)}"))
        return None
    sound = True
    for key, item in value.items():
        try:
            schema = OmegaConf.merge(schema, {key: item})
        except OmegaConfBaseException as error:
            sound = False
            unknown = str(key) not in known
            what = f"unknown key {key!r}" if unknown else str(error).splitlines()[0]
            fix = suggest(str(key), known) if unknown else ""
            problems.append(Problem(where=f"{where}.{key}", what=what, fix=fix))
    for key in sorted(OmegaConf.missing_keys(schema) - set(map(str, value))):
        sound = False
        problems.append(Problem(where=f"{where}.{key}", what="has no value", fix=f"Give {key}"))
    return OmegaConf.to_object(schema) if sound else None


def _number_problems(config: DictConfig) -> Sequence[Problem]:
    if isinstance(config.seed, int) and 0 <= config.seed < 2**32:
        return ()
    return (Problem(where="seed", what=f"{config.seed!r} is not an integer from 0 to 2**32 - 1"),)


def _timeout_problems(config: DictConfig) -> Sequence[Problem]:
    seconds = config.plugin_timeout
    if seconds is None or (isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0):
        return ()
    return (Problem(where="plugin_timeout", what=f"{seconds!r} is not a number of seconds", fix="null: wait for ever"),)


def _tracker_problems(config: DictConfig) -> Sequence[Problem]:
    if config.tracker.kind is Tracker.wandb and find_spec("wandb") is None:
        return (Problem(where="tracker", what="wandb is not installed", fix="pip install 'posttrain[wandb]'"),)
    return ()
