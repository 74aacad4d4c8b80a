"""The plan of a recipe: its stages in running order with typed settings, or every problem in the recipe.

Pure: reads nothing but the recipe, writes nothing and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from posttrain.config.compose import Composition
from posttrain.config.launch import LaunchConfig
from posttrain.config.money import Amount, amount, mended, prices
from posttrain.config.preparation import rule_problems, setting_problem
from posttrain.config.ranges import out_of_range
from posttrain.config.replay import Replay
from posttrain.config.schema import ROOT, EngineName, GateConfig, GateTask, ModelConfig, Source, StageConfig
from posttrain.config.sources import shipped_resolvers
from posttrain.config.typed import (
    check_resolved,
    conform_gate_tasks,
    conform_replay,
    conform_sources,
    empty_names,
    undeclared,
    without_results,
)
from posttrain.errors import BadInput, Problem, nearest, suggest
from posttrain.host.plugins import Host
from posttrain.rewards.scorer import prepared
from posttrain.stage import Stage

CORE = "sft"
ONCE = "SFT is first and only once"
NO_TRACKER = "none"
NOT_OF_A_RUN = ("data", "gate_data", "variant")
"""Keys that a run knows only by what stages take from them."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of the pipeline."""

    name: str
    """Name of its node in the recipe."""
    stage: Stage
    """Kind of the stage."""
    config: StageConfig
    """Typed settings of the stage."""
    sources: tuple[Source, ...]
    """Sources of the trained records."""
    eval_sources: tuple[Source, ...]
    """Sources of the records for the eval loss; never trained."""
    tasks: Mapping[str, GateTask]
    """Tasks of the stage's gate by name."""
    seed: int
    """Seed of everything random in the stage."""
    origin: str
    """The stage's plugin with its version; part of the result's fingerprint."""
    replay: Replay | None = None
    """Settings of the replayed source, which is the last of ``sources``; None without one."""
    rewards: Mapping[str, str] = field(default_factory=dict)
    """Each reward of sampled answers by name, with its version and plugin; part of the result's fingerprint."""
    cache: Path | None = None
    """Folder of copies of hub datasets and URLs, and of remembered digests, shared by all runs."""

    @property
    def gate(self) -> GateConfig:
        """Settings of the gate after the stage."""
        return self.config.gate

    @property
    def own_sources(self) -> tuple[Source, ...]:
        """Sources of the trained records but for the replayed one."""
        return self.sources if self.replay is None else self.sources[:-1]

    def replaying(self, share: float) -> Step:
        """Return the step with another share of replayed tokens."""
        if self.replay is None:
            raise ValueError(f"{self.name} replays nothing")
        return replace(self, sources=(*self.sources[:-1], self.replay.source(share)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of a recipe, and everything they depend on."""

    recipe: str
    """Name of the recipe."""
    words: tuple[str, ...]
    """The command line."""
    model: ModelConfig
    """The base model."""
    steps: tuple[Step, ...]
    """Stages in running order."""
    settings: Mapping[str, Any]
    """Typed settings of plugins, apart from their stages, by name; a tracker's only when it is chosen."""
    shaping: tuple[str, ...]
    """Names of the settings among them with an effect on artifacts."""
    tracker: str
    """Name of the chosen tracker, or ``none``."""
    engine: EngineName
    """Division of training among processes; no part of any result's name."""
    launch: LaunchConfig
    """Processes that train a stage together."""
    seed: int
    """Seed of the run."""
    plugin_timeout: float | None
    """Longest silence of a plugin, in seconds; None for no limit."""
    data_workers: int | None
    """Processes that render records; None for one on each core."""
    output_root: Path
    """Folder of all runs."""
    start_from: Path | None
    """Folder of the artifact to start from; None: the base."""
    spend_cap: Amount | None
    """Most that the run may spend, in money or hours; None for no limit."""
    price_per_hour: Amount | None
    """Price of one device for an hour; None for that of the table."""
    start_from_unpromoted: bool
    """True when ``start_from`` may be an artifact that no gate passed."""
    resolved: Mapping[str, Any]
    """The recipe as plain data, every interpolation resolved."""
    shadows: tuple[str, ...] = ()
    """A line for each chosen option with a second file of its name, which is not used."""


def make_plan(composition: Composition, host: Host) -> Plan:
    """Return the plan of a composed recipe; raise BadInput with every problem, those of composing included."""
    problems = list(composition.problems)
    with shipped_resolvers():
        plan = _planned(composition, host, problems)
    for answer in host.hook.check_plan(plan=plan):
        problems += answer
    if problems:
        raise BadInput(problems)
    return plan


def _planned(composition: Composition, host: Host, problems: list[Problem]) -> Plan:
    """Return the plan; add the mistakes in its typed settings to ``problems``. Raises BadInput for earlier ones."""
    config = composition.config
    problems += _unknown_nodes(composition, host)
    names, order_problems = _order(config, host)
    problems += order_problems
    used = [*(key for key in ROOT if key not in NOT_OF_A_RUN), *host.own_nodes(), *names]
    if any(_takes_recipe_data(config[name]) for name in names):
        used.append("data")
    broken = [*check_resolved(config, used), *undeclared(config, used), *empty_names(config, [*used, "gate_data"])]
    # Typed settings can be made only of nodes without a fault, so these problems end the search; later ones add up.
    if broken or problems:
        raise BadInput(without_results(problems + broken))
    model = _typed(config.model)
    steps = [_step(name, config, host, problems) for name in names]
    launch: LaunchConfig = _typed(config.launch)
    problems += [Problem(where=f"launch.{key}", what=what) for key, what in out_of_range(launch)]
    problems += [
        *_number_problems(config),
        *_timeout_problems(config),
        *_worker_problems(config),
        *_consent_problems(config),
        *_cap_problems(config),
        *(() if any(".data" in each.where for each in problems) else _data_problems(composition)),
    ]
    settings = _plugin_settings(composition, host, problems)
    return Plan(
        recipe=composition.recipe,
        words=composition.words,
        model=model,
        steps=tuple(steps),
        settings=settings,
        shaping=tuple(name for name in settings if host.settings[name].shapes_data),
        tracker=next((name for name in settings if host.settings[name].group == "tracker"), NO_TRACKER),
        engine=config.engine,
        launch=launch,
        seed=config.seed,
        plugin_timeout=config.plugin_timeout,
        data_workers=config.data_workers,
        output_root=Path(str(config.output_root)),
        start_from=Path(str(config.start_from)) if config.start_from else None,
        spend_cap=None if config.spend_cap is None else amount(config.spend_cap),
        price_per_hour=None if config.price_per_hour is None else amount(config.price_per_hour),
        start_from_unpromoted=config.start_from_unpromoted,
        resolved={key: _plain(config[key]) for key in used},
        shadows=composition.shadows,
    )


def _stage_nodes(config: DictConfig) -> list[str]:
    """Return the top-level nodes typed by a stage's config, in the order of the recipe."""
    types = {str(key): OmegaConf.get_type(config, str(key)) for key in config}
    return [key for key, kind in types.items() if isinstance(kind, type) and issubclass(kind, StageConfig)]


def _unknown_nodes(composition: Composition, host: Host) -> list[Problem]:
    """Return a problem for each top-level key without an owner, such as a stage's misspelt name."""
    keys = [*ROOT, *host.own_nodes()]
    known = {*keys, *_stage_nodes(composition.config), *composition.removed}
    return [
        Problem(
            where=f"recipe: {key}",
            what=f"{key!r} is neither a setting nor a stage of this recipe",
            fix=_mend(key, [*keys, *host.stages], host),
        )
        for key in map(str, composition.config)
        if key not in known
    ]


def _mend(key: str, known: Sequence[str], host: Host) -> str:
    """Return the fix of a top-level key without an owner: a stage in the defaults, or the nearest name."""
    if key in host.stages:
        return f"Add it to the defaults: - /stage@{key}: {key}; or leave out the defaults: then it is a stage as it is"
    return f"For a stage, add - /stage@{key}: KIND to the defaults. {suggest(key, known)}"


def _order(config: DictConfig, host: Host) -> tuple[list[str], list[Problem]]:
    """Return the names of the stages in running order, and the problems of that order."""
    nodes = _stage_nodes(config)
    chosen = config.stages
    if chosen is not None and not isinstance(chosen, ListConfig):
        return [], [Problem(where="stages", what=f"must be a list, not {chosen!r}", fix="'stages=[sft,dpo]'")]
    names = nodes if chosen is None else [str(name) for name in chosen]
    problems = [
        Problem(
            where="stages",
            what=f"the recipe has no stage {name!r}",
            fix=f"Add it: +stage@{name}={name}" if name in host.stages else _missing_stage(name, nodes, host),
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


def _missing_stage(name: str, nodes: Sequence[str], host: Host) -> str:
    """Return the fix of a stage that the recipe has not: the nearest that it has, or that it can be given."""
    close, kind = nearest(name, nodes), nearest(name, host.stages)
    if close or kind is None:
        return suggest(name, nodes)
    return f"Did you mean {kind}? Then add it, too: +stage@{kind}={kind}. Available: {', '.join(nodes)}"


def _core_problems(names: list[str], kinds: list[str], start_from: str | None, host: Host) -> list[Problem]:
    """Return the problems of SFT's place: first and once, or absent when ``start_from`` names an artifact."""
    if start_from and CORE in kinds:
        return [Problem(where="start_from", what="the pipeline runs SFT itself", fix="Leave out start_from, or sft")]
    if not start_from and (not kinds or kinds[0] != CORE):
        what = f"the pipeline starts with {names[0]!r}" if names else "the recipe has no stages"
        fix = "SFT is mandatory and first: put sft first, or give start_from=DIR, an artifact stacked on SFT"
        return [Problem(where="stages", what=what, fix=fix)]
    late = [name for name, kind in list(zip(names, kinds, strict=True))[1:] if kind == CORE]
    return [Problem(where="stages", what=f"{name!r} runs SFT a second time", fix=ONCE) for name in late]


def _takes_recipe_data(node: DictConfig) -> bool:
    """Return True when the stage gives ``data: null`` and so trains on the data of the recipe."""
    given = OmegaConf.is_missing(node, "data") or OmegaConf.is_interpolation(node, "data")
    return not given and node.data is None


def _data_problems(composition: Composition) -> list[Problem]:
    """Return a problem when the recipe has data that none of its stages, chosen or not, trains on."""
    config, stages = composition.config, _stage_nodes(composition.config)
    absent = OmegaConf.is_dict(config.data) and OmegaConf.is_missing(config.data, "path")
    if absent or config.data is None or any(_takes_recipe_data(config[name]) for name in stages):
        return []
    what = "no stage trains on it, as each has data of its own"
    given = [word for word in composition.words if word.startswith(tuple(f"{name}.data=" for name in stages))]
    fix = " or ".join(f"{name}.data=FILE" for name in stages)
    fix = f"data=FILE in place of {given[0]}" if given else fix  # the recipe's file has data, and the word replaces it
    return [Problem(where="data", what=what, fix=f"Give {fix}")]


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return OmegaConf.to_container(value, resolve=True, enum_to_str=True) if OmegaConf.is_config(value) else value


def _typed(node: DictConfig) -> Any:
    return OmegaConf.to_object(node)


def _step(name: str, config: DictConfig, host: Host, problems: list[Problem]) -> Step:
    """Return a stage with typed settings; add their mistakes to ``problems``."""
    settings: StageConfig = _typed(config[name])
    stage = host.stages[settings.kind]
    with host.calling(stage.name, "problems"):
        problems += [Problem(where=f"{name}.{key}", what=what) for key, what in settings.problems()]
    problems += [
        Problem(where=f"{name}.prepare.{key}", what=what, fix=suggest(key.partition(".")[2], known))
        for key, what, known in rule_problems(settings.prepare, host.filters)
    ]
    if (wrong := setting_problem(settings.prepare)) is not None:
        problems.append(Problem(where=f"{name}.prepare.{wrong[0]}", what=wrong[1], fix=wrong[2]))
    sources = conform_sources(f"{name}.data", config.data if settings.data is None else settings.data, problems)
    replay = conform_replay(f"{name}.replay", settings.replay, problems)
    sources = sources if replay is None else (*sources, replay.source(replay.shares[0]))
    eval_data = settings.eval_sources()
    eval_sources = () if eval_data is None else conform_sources(f"{name}.eval_data", eval_data, problems)
    tasks = conform_gate_tasks(f"{name}.gate", settings.gate, host, problems)
    return Step(
        name=name, stage=stage, config=settings, sources=sources, eval_sources=eval_sources, tasks=tasks,
        seed=config.seed, origin=host.origin(stage.name), cache=Path(str(config.output_root)) / "cache" / "data",
        rewards=_rewards(name, settings, sources, host, problems), replay=replay,
    )  # fmt: skip


def _rewards(
    name: str, settings: StageConfig, sources: Sequence[Source], host: Host, problems: list[Problem]
) -> dict[str, str]:
    """Return the rewards of a stage and of its sources, with versions; add unusable ones to ``problems``."""
    asked = [(f"{name}.data.on_policy", source.on_policy.reward) for source in sources if source.on_policy is not None]
    if (own := settings.rewarding()) is not None:
        asked.append((name, own))
    found: dict[str, str] = {}
    for where, given in asked:
        try:
            found |= prepared(given, host.rewards, host.reward_owners, f"{where}.reward")
        except BadInput as error:
            problems += error.problems
    return found


def _plugin_settings(composition: Composition, host: Host, problems: list[Problem]) -> dict[str, Any]:
    """Return the typed settings of plugins, apart from their stages; add their mistakes to ``problems``."""
    config, found = composition.config, {}
    for name, declared in host.settings.items():
        node = declared.group or name
        if OmegaConf.get_type(config, node) is not declared.config:  # an option of the group, not the chosen one
            continue
        found[name] = settings = _typed(config[node])
        with host.calling(name, "problems"):
            given = [*out_of_range(settings), *(settings.problems() if hasattr(settings, "problems") else ())]
            problems += [Problem(where=f"{node}.{key}", what=what) for key, what in given]
    chosen = composition.tracker
    if chosen != NO_TRACKER and not any(host.settings[name].group == "tracker" for name in found):
        fix = "Put /settings@_here_: NAME, the name of an installed tracker, into the defaults of its file"
        problems.append(Problem(where="tracker", what=f"the option {chosen!r} has no tracker's settings", fix=fix))
    return found


def _number_problems(config: DictConfig) -> Sequence[Problem]:
    if isinstance(config.seed, int) and 0 <= config.seed < 2**32:
        return ()
    return (Problem(where="seed", what=f"{config.seed!r} is not an integer from 0 to 2**32 - 1"),)


def _consent_problems(config: DictConfig) -> Sequence[Problem]:
    given = config.start_from_unpromoted
    if isinstance(given, bool):
        return ()
    return (Problem(where="start_from_unpromoted", what=f"{given!r} is neither true nor false"),)


def _worker_problems(config: DictConfig) -> Sequence[Problem]:
    count = config.data_workers
    if count is None or (isinstance(count, int) and not isinstance(count, bool) and count > 0):
        return ()
    return (Problem(where="data_workers", what=f"{count!r} is not a number of processes", fix="null: one a core"),)


def _timeout_problems(config: DictConfig) -> Sequence[Problem]:
    seconds = config.plugin_timeout
    if seconds is None or (isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0):
        return ()
    return (Problem(where="plugin_timeout", what=f"{seconds!r} is not a number of seconds", fix="null: wait for ever"),)


def _cap_problems(config: DictConfig) -> Sequence[Problem]:
    cap, price = amount(config.spend_cap), amount(config.price_per_hour)
    if config.spend_cap is not None and cap is None:
        fix = mended(config.spend_cap)
        return (Problem(where="spend_cap", what=f"{config.spend_cap!r} is no amount", fix=fix),)
    if config.price_per_hour is not None and (price is None or price.is_time):
        what = f"{config.price_per_hour!r} is no amount of money"
        return (Problem(where="price_per_hour", what=what, fix="Write it with its currency, such as 2.50 USD"),)
    currency = prices()["currency"] if price is None else price.unit
    if cap is not None and not cap.is_time and cap.unit != currency:
        known = "the prices of conf/prices.yaml are" if price is None else "price_per_hour is"
        fix = f"Give price_per_hour='2.50 {cap.unit}', or a cap in {currency}"
        return (Problem(where="spend_cap", what=f"is in {cap.unit}, and {known} in {currency}", fix=fix),)
    return ()
