"""The plugin manager: the essentials and every entry point, each loaded in isolation.

A plugin that fails to load is reported and left out, and a recipe that needs it is rejected with the reason. Two
environment variables choose plugins by the names of their entry points:

    POSTTRAIN_PLUGINS=preference,mine==1.2    only these; with ==, only in this version of the distribution
    POSTTRAIN_BLOCK_PLUGINS=mine,theirs       all but these
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from posttrain import hookspecs
from posttrain.config.paths import shipped
from posttrain.errors import PluginFailed
from posttrain.host import activity, consent, readers
from posttrain.host.activity import Activity
from posttrain.host.choice import Choice
from posttrain.host.guard import SETTINGS, START_SECONDS, Guard, ask_traced, guarded
from posttrain.host.process_state import ProcessState
from posttrain.host.readers import Reader
from posttrain.host.registration import (
    RECIPES,
    ask,
    ask_folders,
    check_api,
    check_filter,
    check_hook_names,
    check_option,
    check_reader,
    check_reward,
    check_settings,
    check_stage,
    find_options,
    find_tasks,
)
from posttrain.rewards.reward import Reward
from posttrain.stage import Settings, Stage
from posttrain.version import __version__

if TYPE_CHECKING:
    from posttrain.plan import Plan

GROUP = "posttrain"
ROOMS = ("sft", "rewards", "data", "prepare", "model", "scoring", "gate", "launch", "run")
ESSENTIAL = tuple(f"posttrain.{room}.plugin" for room in ROOMS)
"""Hook implementations of posttrain itself; they cannot be blocked."""
SHAPING = ("load_records", "run_stage")
"""Hooks whose implementations decide what is trained."""
BUILT_IN = "built in"
CORE_ORIGIN = f"posttrain {__version__}"


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """One plugin in ``posttrain list plugins``."""

    name: str
    origin: str
    """Distribution and version."""
    state: str
    """``loaded``, ``blocked`` or ``failed``."""
    reason: str = ""
    stages: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """Names of the settings that belong to no stage."""

    @property
    def is_ours(self) -> bool:
        """True when it is built in or comes with posttrain's own distribution."""
        return self.origin in (BUILT_IN, CORE_ORIGIN)

    @property
    def version(self) -> str:
        """Version of the distribution: posttrain's for a built-in plugin, empty without a distribution."""
        if self.origin == BUILT_IN:
            return __version__
        return self.origin.rpartition(" ")[2] if " " in self.origin else ""

    def __str__(self) -> str:
        state = "is blocked" if self.state == "blocked" else "failed to load"
        return f"plugin {self.name} ({self.origin}) {state}: {self.reason}"


@dataclass
class Host:
    """The plugin manager with everything that plugins registered."""

    manager: pluggy.PluginManager
    stages: dict[str, Stage] = field(default_factory=dict)
    settings: dict[str, Settings] = field(default_factory=dict)
    """Settings that belong to no stage."""
    rewards: dict[str, Reward] = field(default_factory=dict)
    reward_owners: dict[str, str] = field(default_factory=dict)
    """The plugin of each reward, with its version, by the reward's name."""
    folders: dict[str, list[Path]] = field(default_factory=dict)
    tasks: dict[str, Path] = field(default_factory=dict)
    """Files of the plugins' lm-eval tasks, by the task's name."""
    options: dict[str, Path] = field(default_factory=dict)
    """Files of recipes and of the options of groups, by names such as ``recipes/mine`` and ``gate/mine``."""
    filters: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Rules on rows, each with the name of its plugin, by their names."""
    readers: dict[str, tuple[str, Reader]] = field(default_factory=dict)
    """Formats of files, each with the name of its plugin, by their endings."""
    plugins: dict[str, PluginInfo] = field(default_factory=dict)
    listeners: dict[str, str] = field(default_factory=dict)
    """The plugin of each object that is registered for the current run alone, by the names of both."""

    @property
    def hook(self) -> Any:
        """The hooks of every loaded plugin, to be called."""
        return self.manager.hook

    def failures(self) -> list[PluginInfo]:
        """Return the plugins that failed to load."""
        return [info for info in self.plugins.values() if info.state == "failed"]

    def blocked(self) -> list[PluginInfo]:
        """Return the plugins that the user does not want."""
        return [info for info in self.plugins.values() if info.state == "blocked"]

    def calling(self, name: str, call: str) -> contextlib.AbstractContextManager[None]:
        """Guard a call into the plugin of a stage or of settings: its faults are PluginFailed with its name."""
        info = self.owner(name)
        if info.origin == BUILT_IN:
            return contextlib.nullcontext()
        return Guard(info.name, info.origin).calling(call)

    def guarding(self, plugin: str, call: str) -> contextlib.AbstractContextManager[None]:
        """Guard a call into a plugin by its name: its faults are PluginFailed with its name."""
        return Guard(plugin, self.plugins[plugin].origin).calling(call)

    def leave_out(self, name: str, failure: PluginFailed) -> None:
        """Unregister the plugin of a stage or of settings, because it has failed after all."""
        info = self.owner(name)
        self.manager.unregister(name=info.name)
        for stage in info.stages:
            del self.stages[stage]
        for settings in info.settings:
            del self.settings[settings]
        for reward in [name for name, owner in self.reward_owners.items() if owner == f"{info.name} ({info.origin})"]:
            del self.rewards[reward], self.reward_owners[reward]
        del self.folders[info.name]
        self.filters = {filter_: found for filter_, found in self.filters.items() if found[0] != info.name}
        self.readers = {suffix: found for suffix, found in self.readers.items() if found[0] != info.name}
        readers.use(self.readers)
        _fail(self, info.name, info.origin, _reason(info.name, info.origin, failure))

    def owner(self, name: str) -> PluginInfo:
        """Return the plugin that registered a stage or settings."""
        return next(info for info in self.plugins.values() if name in (*info.stages, *info.settings))

    def origin(self, name: str) -> str:
        """Return the plugin of a stage or of settings with its version, or posttrain itself."""
        info = self.owner(name)
        return CORE_ORIGIN if info.origin == BUILT_IN else f"{info.name} ({info.origin})"

    def own_nodes(self) -> list[str]:
        """Return the names of the settings that have a key of their own at the top level of a recipe."""
        return [settings.name for settings in self.settings.values() if settings.group is None]

    def shapers(self) -> list[str]:
        """Return the third parties' plugins that may change artifacts: by records, by stages, by their settings."""
        names = {
            self.listeners.get(name, name)
            for name, plugin in self.manager.list_name_plugin()
            for caller in self.manager.get_hookcallers(plugin) or []
            if caller.name in SHAPING
        }
        return self.others(names | {self.owner(key).name for key, each in self.settings.items() if each.shapes_data})

    def others(self, names: Iterable[str]) -> list[str]:
        """Return those of the named plugins that are third parties', with their versions."""
        found = (self.plugins[name] for name in {*names} & self.plugins.keys())
        return sorted(f"{info.name} ({info.origin})" for info in found if not info.is_ours)

    def ask_first(self, hook: str, **arguments: Any) -> tuple[Any, tuple[str, ...]]:
        """Call a hook of the first result; return the answer and the plugins behind it, with their versions.

        The plugin that answered comes first, then those that wrapped it.
        """
        found = [
            (each, self._label(each.plugin_name, each.plugin)) for each in getattr(self.hook, hook).get_hookimpls()
        ]
        return ask_traced(hook, found, arguments)

    def answerers(self, *hooks: str) -> list[str]:
        """Return the plugins with an implementation of these hooks, with their versions."""
        found = [each for hook in hooks for each in getattr(self.hook, hook).get_hookimpls()]
        return sorted({self._label(each.plugin_name, each.plugin) for each in found})

    def _label(self, name: str, plugin: object) -> str:
        """Return a plugin with its version, or posttrain itself; its type when it has no name of its own."""
        name = self.listeners.get(name, name)
        info = self.plugins.get(name)
        if info is None:
            return f"{type(plugin).__module__}.{type(plugin).__qualname__}" if name == str(id(plugin)) else name
        return CORE_ORIGIN if info.origin == BUILT_IN else f"{info.name} ({info.origin})"

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Unregister at the end of the context everything that is registered inside it."""
        before = self.manager.get_plugins()
        try:
            yield
        finally:
            for plugin in self.manager.get_plugins() - before:
                self.manager.unregister(plugin)
            self.listeners.clear()

    def start_run(self, plan: Plan, directory: Path) -> None:
        """Call ``run_started`` and register every answer. Raises PluginFailed naming the plugin."""
        for name, plugin in reversed(self.manager.list_name_plugin()):
            others = self.manager.get_plugins() - {plugin}
            for answer in self.manager.subset_hook_caller("run_started", others)(plan=plan, directory=directory):
                self._listen(name, answer)

    def _listen(self, name: str, listener: object) -> None:
        info = self.plugins.get(name)
        try:
            if info is not None and info.origin != BUILT_IN:
                listener = guarded(listener, name, info.origin)
            registered = self.manager.register(listener, f"{name} in this run")
            check_hook_names(self.manager, listener)
        except (PluginFailed, pluggy.PluginValidationError) as error:
            origin = "" if info is None else f" ({info.origin})"
            raise PluginFailed(f"plugin {name}{origin} in run_started: {error}") from error
        self.listeners[str(registered)] = name


def load(entries: Iterable[EntryPoint] | None = None) -> Host:
    """Return a new host with the essentials and every wanted plugin among the installed distributions."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    host = Host(manager, options=find_options(shipped(RECIPES), shipped("conf")))
    for module in ESSENTIAL:
        _register(host, module.removeprefix("posttrain."), BUILT_IN, importlib.import_module(module))
    found = list(entry_points(group=GROUP) if entries is None else entries)
    choice = Choice.from_environment()
    for entry in sorted(found, key=lambda e: e.name):
        _load_entry(host, entry, choice)
    for name in sorted(choice.wanted.keys() - {entry.name for entry in found}):
        _fail(host, name, "not installed", "POSTTRAIN_PLUGINS names it, but no installed distribution has it")
    readers.use(host.readers)
    return host


def installed_labels() -> list[str]:
    """Return the plugins of the installed distributions as a host labels them, with their versions."""
    return [f"{entry.name} ({_distribution(entry)[0]})" for entry in entry_points(group=GROUP)]


def _load_entry(host: Host, entry: EntryPoint, choice: Choice) -> None:
    origin, version = _distribution(entry)
    if (reason := choice.leaves_out(entry.name)) is not None:
        host.plugins[entry.name] = PluginInfo(name=entry.name, origin=origin, state="blocked", reason=reason)
        return
    if entry.name in host.plugins:
        _fail(host, f"{entry.name} from {origin}", origin, f"the name {entry.name!r} is taken")
        return
    pin = choice.wanted.get(entry.name)
    if pin is not None and version != pin:
        _fail(host, entry.name, origin, f"POSTTRAIN_PLUGINS pins it to {pin}")
    elif entry.name in activity.lost:
        _fail(host, entry.name, origin, f"it {activity.lost[entry.name]}")
    else:
        _import(host, entry, origin)


def _distribution(entry: EntryPoint) -> tuple[str, str | None]:
    """Return the entry's distribution with its version, and the version alone; its module when it has none."""
    if entry.dist is None:
        return entry.value, None
    described = entry.dist.metadata  # every access parses it again
    return f"{described['Name']} {described['Version']}", described["Version"]


def _import(host: Host, entry: EntryPoint, origin: str) -> None:
    before = ProcessState.now()
    importing = Activity(plugin=entry.name, origin=origin, call="import", silence_limit=START_SECONDS, starting=True)
    try:
        with activity.calling(importing):
            plugin = entry.load()
    except BaseException as error:  # a foreign module may raise anything
        if isinstance(error, KeyboardInterrupt):
            raise
        _fail(host, entry.name, origin, f"{type(error).__name__}: {error}")
        return
    finally:
        moved = [change for change in before.changes() if "directory" in change]
        before.restore()  # random numbers that it drew, too
    if moved:
        _fail(host, entry.name, origin, f"importing it changed {moved[0]}")
        return
    _register(host, entry.name, origin, plugin)


@dataclass(frozen=True, kw_only=True)
class Registered:
    """Everything that one plugin registers."""

    stages: list[Stage]
    settings: list[Settings]
    rewards: list[Reward]
    folders: list[Path]
    tasks: dict[str, Path]
    options: dict[str, Path]
    filters: dict[str, Any]
    readers: dict[str, Reader]


def _register(host: Host, name: str, origin: str, plugin: ModuleType | object) -> None:
    """Register one plugin whole or not at all."""
    try:
        check_api(plugin)
        if origin != BUILT_IN:
            plugin = guarded(plugin, name, origin)
        host.manager.register(plugin, name)
        check_hook_names(host.manager, plugin)
        found = _ask_all(host, Guard(name, origin), plugin)
    except Exception as error:
        if host.manager.has_plugin(name):
            host.manager.unregister(name=name)
        _fail(host, name, origin, _reason(name, origin, error))
        return
    host.stages |= {stage.name: stage for stage in found.stages}
    host.settings |= {settings.name: settings for settings in found.settings}
    owner = CORE_ORIGIN if origin == BUILT_IN else f"{name} ({origin})"
    host.rewards |= {reward.name: reward for reward in found.rewards}
    host.reward_owners |= dict.fromkeys((reward.name for reward in found.rewards), owner)
    host.folders[name] = found.folders
    host.tasks |= found.tasks
    host.options |= found.options
    host.filters |= {each: (name, judge) for each, judge in found.filters.items()}
    host.readers |= {suffix: (name, reader) for suffix, reader in found.readers.items()}
    stages, settings = (tuple(item.name for item in items) for items in (found.stages, found.settings))
    host.plugins[name] = PluginInfo(name=name, origin=origin, state="loaded", stages=stages, settings=settings)


def _ask_all(host: Host, guard: Guard, plugin: ModuleType | object) -> Registered:
    """Ask a plugin everything it registers. Raises PluginFailed when one part of it cannot be used."""
    stages, settings = (ask(host.manager, plugin, hook) for hook in ("register_stages", "register_settings"))
    rewards = ask(host.manager, plugin, "register_rewards")
    folders = ask_folders(host.manager, plugin, "register_config")
    task_folders = ask_folders(host.manager, plugin, "register_eval_tasks")
    tasks = find_tasks(task_folders)
    consent.ship(task_folders)
    for stage in stages:
        check_stage(host, stage)
        with guard.calling(SETTINGS):
            stage.config(kind=stage.name)
    for each in settings:
        check_settings(host, each)
        with guard.calling(SETTINGS):
            each.config()
    for reward in rewards:
        check_reward(host, reward)
    rewards = rewards if guard.origin == BUILT_IN else [guard.reward(reward) for reward in rewards]
    names = [item.name for item in (*stages, *settings)] + [f"reward {reward.name}" for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PluginFailed(f"it registers {twice[0]!r} twice")
    if taken := sorted(tasks.keys() & host.tasks.keys()):
        raise PluginFailed(f"the task {taken[0]!r} is already registered: {host.tasks[taken[0]]}")
    options = {name: path for f in folders for name, path in find_options(f / RECIPES, f / "conf").items()}
    for option, path in options.items():
        check_option(host, option, path)
    filters = ask(host.manager, plugin, "register_filters")
    for each in filters:
        check_filter(host, each)
    names += [each.name for each in filters]
    formats = ask(host.manager, plugin, "register_readers")
    for reader in formats:
        check_reader(host, reader)
    names += [reader.suffix for reader in formats]
    formats = formats if guard.origin == BUILT_IN else [guard.reader(reader) for reader in formats]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PluginFailed(f"it registers {twice[0]!r} twice")
    return Registered(
        stages=stages, settings=settings, rewards=rewards, folders=folders, tasks=tasks, options=options,
        filters={each.name: each for each in filters}, readers={reader.suffix: reader for reader in formats},
    )  # fmt: skip


def _reason(name: str, origin: str, error: Exception) -> str:
    """Return an error's text without the plugin's name: the name is printed next to it."""
    return str(error).removeprefix(f"plugin {name} ({origin}) in ") or type(error).__name__


def _fail(host: Host, name: str, origin: str, reason: str) -> None:
    host.plugins[name] = PluginInfo(name=name, origin=origin, state="failed", reason=reason)
