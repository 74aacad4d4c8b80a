"""Builds the plugin manager: the essentials, then every entry point, each loaded in isolation.

A plugin that cannot be loaded is reported and left out; a recipe that needs one of its stages is refused with that
reason. Two environment variables decide which plugins are loaded, by the names of their entry points:

    POSTTRAIN_PLUGINS=preference,mine==1.2    these and no others; with ==, in this version of their distribution alone
    POSTTRAIN_BLOCK_PLUGINS=mine,theirs       all but these
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from posttrain import hookspecs
from posttrain.config.paths import shipped
from posttrain.errors import PluginFailed
from posttrain.host import activity
from posttrain.host.activity import Activity
from posttrain.host.guard import SETTINGS, START_SECONDS, Guard, Patience, guarded
from posttrain.host.process_state import ProcessState
from posttrain.stage import RECORD_SHAPES, Stage, StageConfig
from posttrain.version import __version__

GROUP = "posttrain"
ESSENTIAL = tuple(f"posttrain.{room}.plugin" for room in ("sft", "data", "model", "scoring", "gate", "run"))
"""The product's own hook implementations; they cannot be blocked."""
SHAPING = ("load_records", "run_stage")
"""Hooks whose implementations decide what is trained."""
BUILT_IN = "built in"
RECIPES = "recipes"
STAGE_NAME = re.compile(r"[a-z][a-z0-9_]*")
CONSTANTS = ("null", "true", "false", "yes", "no", "on", "off", "inf", "nan")
"""Words that YAML or the command line reads as a value, so that no stage can be called so."""
TASK_NAME = re.compile(r"""^task:[ ]*["']?([\w.:-]+)["']?[ ]*(?:#.*)?$""", re.MULTILINE)
"""The line of a task file that names the task; read without a YAML parser, which would slow down every command."""
CORE_ORIGIN = f"posttrain {__version__}"


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """What ``posttrain list plugins`` shows of one plugin."""

    name: str
    origin: str
    """Distribution and version."""
    state: str
    """``loaded``, ``blocked`` or ``failed``."""
    reason: str = ""
    stages: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether it is built in or comes with posttrain's own distribution."""
        return self.origin in (BUILT_IN, CORE_ORIGIN)

    @property
    def version(self) -> str:
        """Version of the distribution; posttrain's own for what is built in, empty when there is no distribution."""
        if self.origin == BUILT_IN:
            return __version__
        return self.origin.rpartition(" ")[2] if " " in self.origin else ""

    def __str__(self) -> str:
        state = "is blocked" if self.state == "blocked" else "failed to load"
        return f"plugin {self.name} ({self.origin}) {state}: {self.reason}"


@dataclass
class Host:
    """The plugin manager with what the plugins registered."""

    manager: pluggy.PluginManager
    stages: dict[str, Stage] = field(default_factory=dict)
    folders: dict[str, list[Path]] = field(default_factory=dict)
    tasks: dict[str, Path] = field(default_factory=dict)
    """The files of the plugins' own lm-eval tasks, by the task's name."""
    options: dict[str, Path] = field(default_factory=dict)
    """The files of recipes and of options of conf's groups, such as ``recipes/mine`` and ``gate/mine``."""
    plugins: dict[str, PluginInfo] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    """How long plugins may go without a sign of life."""

    @property
    def hook(self) -> Any:
        """Calls hooks of every loaded plugin."""
        return self.manager.hook

    def failures(self) -> list[PluginInfo]:
        """The plugins that could not be loaded."""
        return [info for info in self.plugins.values() if info.state == "failed"]

    def blocked(self) -> list[PluginInfo]:
        """The plugins that the user does not want."""
        return [info for info in self.plugins.values() if info.state == "blocked"]

    def calling(self, kind: str, call: str) -> contextlib.AbstractContextManager[None]:
        """Names the plugin that brings a kind of stage in whatever goes wrong inside, as a PluginFailed."""
        info = self._bringing(kind)
        if info.origin == BUILT_IN:
            return contextlib.nullcontext()
        return Guard(info.name, info.origin, self.patience).calling(call)

    def leave_out(self, kind: str, failure: PluginFailed) -> None:
        """Take back the plugin that brings a kind of stage: it has failed after all."""
        info = self._bringing(kind)
        self.manager.unregister(name=info.name)
        for name in info.stages:
            del self.stages[name]
        del self.folders[info.name]
        _fail(self, info.name, info.origin, _reason(info.name, info.origin, failure))

    def _bringing(self, kind: str) -> PluginInfo:
        return next(info for info in self.plugins.values() if kind in info.stages)

    def origin(self, kind: str) -> str:
        """What brings a kind of stage, with its version: posttrain itself, or a plugin and its distribution."""
        info = self._bringing(kind)
        return CORE_ORIGIN if info.origin == BUILT_IN else f"{info.name} ({info.origin})"

    def shapers(self) -> list[str]:
        """Third parties' plugins that read records or run stages: what they do may show in every artifact."""
        found = [
            self.plugins[name]
            for name, plugin in self.manager.list_name_plugin()
            if name in self.plugins and not self.plugins[name].is_ours
            for caller in self.manager.get_hookcallers(plugin) or []
            if caller.name in SHAPING
        ]
        return sorted({f"{info.name} ({info.origin})" for info in found})


def load(entries: Iterable[EntryPoint] | None = None) -> Host:
    """A fresh host with the essentials and every wanted plugin found among the installed distributions."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    host = Host(manager, options=_options(shipped(RECIPES), shipped("conf")))
    for module in ESSENTIAL:
        _register(host, module.removeprefix("posttrain."), BUILT_IN, importlib.import_module(module))
    found = list(entry_points(group=GROUP) if entries is None else entries)
    choice = Choice.from_environment()
    for entry in sorted(found, key=lambda e: e.name):
        _load_entry(host, entry, choice)
    for name in sorted(choice.wanted.keys() - {entry.name for entry in found}):
        _fail(host, name, "not installed", "POSTTRAIN_PLUGINS names it, but no distribution brings it")
    return host


@dataclass(frozen=True)
class Choice:
    """Which plugins the user wants."""

    wanted: dict[str, str | None]
    """Names with the version that they are pinned to; all plugins when there is none."""
    blocked: frozenset[str]

    @classmethod
    def from_environment(cls) -> Choice:
        """What the two environment variables say."""
        words = _words("POSTTRAIN_PLUGINS")
        pins = {name.strip(): version.strip() or None for name, _, version in (word.partition("==") for word in words)}
        return cls(pins, frozenset(_words("POSTTRAIN_BLOCK_PLUGINS")))

    def leaves_out(self, name: str) -> str | None:
        """Why a plugin is not loaded although it could be, or None."""
        if name in self.blocked:
            return "POSTTRAIN_BLOCK_PLUGINS names it"
        return "POSTTRAIN_PLUGINS does not name it" if self.wanted and name not in self.wanted else None


def _words(variable: str) -> list[str]:
    return [word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()]


def _load_entry(host: Host, entry: EntryPoint, choice: Choice) -> None:
    origin, version = _brought_by(entry)
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


def _brought_by(entry: EntryPoint) -> tuple[str, str | None]:
    """The distribution with its version, and the version alone; what the entry names when it belongs to none."""
    if entry.dist is None:
        return entry.value, None
    described = entry.dist.metadata  # parsed whole whenever it is asked for
    return f"{described['Name']} {described['Version']}", described["Version"]


def _import(host: Host, entry: EntryPoint, origin: str) -> None:
    before = ProcessState.now()
    importing = Activity(plugin=entry.name, origin=origin, call="import", seconds=START_SECONDS, starting=True)
    try:
        with activity.calling(importing):
            plugin = entry.load()
    except BaseException as error:  # whatever a foreign module does while it is imported
        if isinstance(error, KeyboardInterrupt):
            raise
        _fail(host, entry.name, origin, f"{type(error).__name__}: {error}")
        return
    finally:
        moved = [change for change in before.changes() if "directory" in change]
        before.restore()  # what it drew from generators of random numbers as well
    if moved:
        _fail(host, entry.name, origin, f"importing it changed {moved[0]}")
        return
    _register(host, entry.name, origin, plugin)


def _register(host: Host, name: str, origin: str, plugin: ModuleType | object) -> None:
    """Register one plugin whole or not at all."""
    try:
        _check_api(plugin)
        if origin != BUILT_IN:
            plugin = guarded(plugin, name, origin, host.patience)
        host.manager.register(plugin, name)
        _check_hook_names(host.manager, plugin)
        stages = _ask(host.manager, plugin, "register_stages")
        folders = _folders(host.manager, plugin, "register_config")
        tasks = _task_files(_folders(host.manager, plugin, "register_eval_tasks"))
        for stage in stages:
            _check_stage(host, stage)
            with Guard(name, origin, host.patience).calling(SETTINGS):
                stage.config(kind=stage.name)
        if taken := sorted(tasks.keys() & host.tasks.keys()):
            raise PluginFailed(f"the task {taken[0]!r} is already registered: {host.tasks[taken[0]]}")
        options = {name: path for f in folders for name, path in _options(f / RECIPES, f / "conf").items()}
        for option, path in options.items():
            _check_option(host, option, path)
    except Exception as error:
        if host.manager.has_plugin(name):
            host.manager.unregister(name=name)
        _fail(host, name, origin, _reason(name, origin, error))
        return
    host.stages |= {stage.name: stage for stage in stages}
    host.folders[name] = folders
    host.tasks |= tasks
    host.options |= options
    host.plugins[name] = PluginInfo(
        name=name, origin=origin, state="loaded", stages=tuple(stage.name for stage in stages)
    )


def _reason(name: str, origin: str, error: Exception) -> str:
    """What went wrong, without the plugin's name, which stands beside it."""
    return str(error).removeprefix(f"plugin {name} ({origin}) in ") or type(error).__name__


def _fail(host: Host, name: str, origin: str, reason: str) -> None:
    host.plugins[name] = PluginInfo(name=name, origin=origin, state="failed", reason=reason)


def _ask(manager: pluggy.PluginManager, plugin: object, hook: str) -> list[Any]:
    """One plugin's answer to a collecting hook."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    answers = manager.subset_hook_caller(hook, others).__call__()
    return [item for answer in answers for item in answer]


def _folders(manager: pluggy.PluginManager, plugin: object, hook: str) -> list[Path]:
    folders = _ask(manager, plugin, hook)
    if not all(isinstance(folder, Path) for folder in folders):
        raise PluginFailed(f"{hook} must return paths")
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise PluginFailed(f"{hook} names {absent[0]}, which is no folder")
    return folders


def _options(recipes: Path, conf: Path) -> dict[str, Path]:
    """The recipes in one folder and the options of groups in the other."""
    found = {f"{RECIPES}/{path.stem}": path for path in recipes.glob("*.yaml")}
    return found | {f"{path.parent.name}/{path.stem}": path for path in conf.glob("*/*.yaml")}


def _task_files(folders: Iterable[Path]) -> dict[str, Path]:
    """The task files of some folders by the names of their tasks; files without one are there to be included."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            if name := TASK_NAME.search(path.read_text(encoding="utf-8")):
                if name[1] in found:
                    raise PluginFailed(f"{path} and {found[name[1]]} both define the task {name[1]!r}")
                found[name[1]] = path.resolve()
    return found


def _check_api(plugin: object) -> None:
    wanted = getattr(plugin, "POSTTRAIN_API", hookspecs.API_VERSION)
    if wanted != hookspecs.API_VERSION:
        raise PluginFailed(f"it is written for plugin API {wanted}; this posttrain has {hookspecs.API_VERSION}")


def _check_hook_names(manager: pluggy.PluginManager, plugin: object) -> None:
    """Refuse hook implementations that no specification knows: pluggy alone would never call them."""
    for caller in manager.get_hookcallers(plugin) or []:
        if not caller.has_spec():
            implementation = next(impl for impl in caller.get_hookimpls() if impl.plugin is plugin)
            if not implementation.optionalhook:
                raise PluginFailed(f"unknown hook {caller.name!r}")


def _check_option(host: Host, option: str, path: Path) -> None:
    """Refuse a file that would never be read, because another one of its name is found first."""
    group, _, name = option.partition("/")
    if option in host.options:
        raise PluginFailed(f"{path}: the name {name!r} is taken by {host.options[option]}")
    if group == "stage" and name in host.stages:
        raise PluginFailed(f"{path}: the stage {name!r} is that of {host.origin(name)}")


def is_stage_name(name: str) -> bool:
    """Whether a stage can be called so: recipes and the command line name it without quotes."""
    return STAGE_NAME.fullmatch(name) is not None and name not in CONSTANTS


def _check_stage(host: Host, stage: object) -> None:
    if not isinstance(stage, Stage):
        raise PluginFailed(f"register_stages must return Stage objects, not {type(stage).__name__}")
    if not is_stage_name(stage.name):
        raise PluginFailed(f"{stage.name!r} cannot be the name of a stage: lower-case letters, digits and _")
    if stage.name in host.stages:
        raise PluginFailed(f"the stage {stage.name!r} is already registered by {host.origin(stage.name)}")
    config = stage.config
    if not (isinstance(config, type) and issubclass(config, StageConfig) and "__dataclass_fields__" in vars(config)):
        raise PluginFailed(f"the config of stage {stage.name!r} must be a dataclass that inherits from StageConfig")
    if stage.parent not in ("base", "sft"):
        raise PluginFailed(f"the parent of stage {stage.name!r} must be 'base' or 'sft', not {stage.parent!r}")
    if stage.records not in RECORD_SHAPES:
        raise PluginFailed(f"stage {stage.name!r} asks for {stage.records!r}; shapes are {', '.join(RECORD_SHAPES)}")
    if stage.run.count(":") != 1:
        raise PluginFailed(f"run of stage {stage.name!r} must read 'package.module:function', not {stage.run!r}")
