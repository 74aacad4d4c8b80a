"""Sources of Hydra: recipes, groups and the schemas of stages.

Registered in this process only: a ``hydra_plugins`` package would reach into every Hydra application of the
environment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, cast

from hydra.conf import JobConf, OverridesConf, RuntimeConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, EnumNode, OmegaConf
from omegaconf.basecontainer import BaseContainer

from posttrain.config.launch import LaunchConfig
from posttrain.config.paths import conf_folders, recipe_folders, shipped
from posttrain.config.plain import Known, full_form
from posttrain.config.regression import RegressionConfig
from posttrain.config.schema import (
    FROM_VARIANT,
    EngineName,
    Method,
    ModelConfig,
    Source,
    StageConfig,
    from_recipe,
    variant_rates,
)
from posttrain.config.settings_file import HYDRA, Reading
from posttrain.errors import PluginFailed
from posttrain.host.guard import SETTINGS
from posttrain.host.plugins import Host
from posttrain.stage import Stage

PROGRAM = "posttrain"
SCHEMA = {"model": ModelConfig, "data": Source, "launch": LaunchConfig}
"""Typed nodes of every recipe, other than its stages and the settings of plugins."""
GROUP = "recipe/"


def register(host: Host, named: Sequence[Path] = ()) -> None:
    """Register with Hydra every stage, recipe, group and schema of the host, and the folders of the command line.

    A plugin with settings that Hydra cannot represent is left out.
    """
    if _Stored.nodes != _nodes(host):  # making them takes longer than all else here
        _store(host)
        _Stored.nodes = _nodes(host)
    plugin_folders = _plugin_folders(host)
    conf = conf_folders(plugin_folders)
    RecipeSearchPath.recipes = recipe_folders(plugin_folders)
    RecipeSearchPath.conf, RecipeSearchPath.named = conf[1:], list(named)
    RecipeSource.known = _known(host)
    FolderSource.begin()
    FolderSource.dropped = set()
    plugins = Plugins.instance()
    for plugin in (FolderSource, RecipeSource, RecipeSearchPath):
        plugins.register(plugin)


class _Shared(dict[str, Any]):
    """Nodes of Hydra's store: every composition copies its sources, and the store with them, unless they are shared.

    Composing changes none of them, as it loads copies.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Stored:
    """The contents of Hydra's store while a recipe is composed, which live as long as the process."""

    nodes: ClassVar[tuple[Any, ...]] = ()
    """The result of ``_nodes`` for the host in it."""
    repo: ClassVar[_Shared] = _Shared()


@contextlib.contextmanager
def own_store() -> Iterator[ConfigStore]:
    """Hide what others keep in Hydra's store, Hydra's own settings among it, and show ours."""
    store = ConfigStore.instance()
    others, store.repo = store.repo, _Stored.repo
    try:
        yield store
    finally:
        store.repo = others


def hydras_settings() -> DictConfig:
    """Return what composing needs of Hydra's own settings; all of them would take a third of the time."""
    return OmegaConf.create({"overrides": OverridesConf, "job": JobConf(name=PROGRAM), "runtime": RuntimeConf})


def _nodes(host: Host) -> tuple[Any, ...]:
    """Return what the nodes in Hydra's store depend on: the types of all settings, and the stages with a file."""
    stages = [(name, stage.config) for name, stage in host.stages.items()]
    settings = [(name, each.config, each.group) for name, each in host.settings.items()]
    return stages, settings, _stages_with_files(host)


def _stages_with_files(host: Host) -> list[str]:
    conf = conf_folders(_plugin_folders(host))
    return [kind for kind in host.stages if any((folder / "stage" / f"{kind}.yaml").exists() for folder in conf)]


def _plugin_folders(host: Host) -> list[Path]:
    return [folder for folders in host.folders.values() for folder in folders]


def _store(host: Host) -> None:
    """Put every schema of the host into a new store."""
    _Stored.repo = _Shared()
    with own_store() as store:
        _fill(store, host)


def _fill(store: ConfigStore, host: Host) -> None:
    """Store every schema, those of the stages as options."""
    store.store(group=HYDRA, name="config", node=hydras_settings())
    regression = OmegaConf.structured(RegressionConfig)
    store.store(name="regression_schema", node=regression)
    variant: dict[str, dict[str, str]] = {}
    made = _store_settings(store, host, variant)
    for kind in host.stages.keys() - _stages_with_files(host):  # the others start from their files
        store.store(group="stage", name=kind, node=made[kind])
    own = {name: host.settings[name].config for name in host.own_nodes()}
    typed = {key: OmegaConf.structured(kind) for key, kind in {**SCHEMA, **own}.items()}
    for node in (regression.model, typed["model"]):
        OmegaConf.set_struct(node.template_variables, value=False)  # its keys are the template's
    engine = EnumNode(EngineName, EngineName.auto)
    store.store(name="schema", node=OmegaConf.create({**typed, "variant": variant, "engine": engine}))


def _stage_settings(stage: Stage, variant: dict[str, dict[str, str]]) -> Any:
    """Return the settings of ``stage``; defaults that follow the variant become keys of ``variant`` and point there."""
    defaults = {field.name: field.default for field in fields(stage.config) if variant_rates(field.default)}
    if not defaults or stage.name == "method":  # variant.method is taken: the setting keeps its own default
        return _open(stage.config(kind=stage.name))
    variant[stage.name] = {name: str(default) for name, default in defaults.items()}
    given = {name: from_recipe(f"variant.{stage.name}.{name}") for name in defaults}
    return _open(stage.config(kind=stage.name, **given))


def _open(settings: StageConfig) -> Any:
    """Return settings in which ``prepare.rules`` takes any key: its keys are the rules', plugins' among them."""
    node = OmegaConf.structured(settings)
    OmegaConf.set_struct(node.prepare.rules, value=False)
    return node


def _known(host: Host) -> Known:
    """Return the names that a plain recipe may use."""
    return Known(
        stages={name: stage.config for name, stage in host.stages.items()},
        nodes=host.own_nodes(),
        is_model=lambda name: option_file("model", name) is not None,
        is_gate=lambda name: option_file("gate", name) is not None,
        gate=_gate_settings,
    )


def _gate_settings(name: str) -> Mapping[str, Any]:
    path = option_file("gate", name)
    raw: Any = {} if path is None else OmegaConf.to_container(Reading().read(path, f"gate/{name}")[0], resolve=False)
    return cast(Mapping[str, Any], raw)


def option_file(group: str, name: str) -> Path | None:
    """Return the file of an option of a group; None when there is none."""
    folders = [shipped("conf"), *RecipeSearchPath.conf, *RecipeSearchPath.named]
    found = [] if "/" in name else [folder / group / f"{name}.yaml" for folder in folders]
    return next((path for path in found if path.is_file()), None)


def _from_variant(method: str, adapter: float, full: float) -> float:
    return full if method == Method.full.value else adapter


def _store_settings(store: ConfigStore, host: Host, variant: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Store the settings of every stage, and those that belong to none, as options of the group ``settings``.

    Return those of the stages by name.
    """
    made: dict[str, Any] = {}
    for name in (*host.stages, *host.settings):
        if name not in host.stages and name not in host.settings:  # its plugin has just been left out
            continue
        try:
            with host.calling(name, SETTINGS):
                stage = host.stages.get(name)
                node = host.settings[name].config() if stage is None else _stage_settings(stage, variant)
                store.store(group="settings", name=name, node=node)
                if stage is not None:
                    made[name] = node
        except PluginFailed as failure:
            host.leave_out(name, failure)
    return made


class RecipeSearchPath(SearchPathPlugin):
    """Adds the folders of recipes, of plugins and of the command line to Hydra's search path."""

    recipes: ClassVar[list[Path]] = []
    conf: ClassVar[list[Path]] = []
    named: ClassVar[list[Path]] = []
    """Folders that the command line names."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folders; called by Hydra."""
        for folder in self.recipes:
            search_path.append("recipes", f"{RecipeSource.scheme()}://{folder}")
        for folder in self.conf:
            search_path.append("plugin", f"{FolderSource.scheme()}://{folder}")
        for folder in self.named:
            search_path.append("named", f"{FolderSource.scheme()}://{folder}")


class FolderSource(ConfigSource):
    """Serves ``<folder>/<group>/<name>.yaml`` as the option ``<group>=<name>``."""

    reading: ClassVar[Reading] = Reading()
    """The files of this composition."""
    dropped: ClassVar[set[str]] = set()
    """Dotted keys to leave out of recipes: each is reported already, and composing continues to find the next."""

    @staticmethod
    def begin() -> Reading:
        """Begin to read the files of another composition."""
        FolderSource.reading = Reading(form=RecipeSource.full_form)
        return FolderSource.reading

    @staticmethod
    def scheme() -> str:
        """Return the scheme of these sources; called by Hydra."""
        return "options"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file as data. Raises BadInput for anything else in it."""
        path = self._file(config_path)
        if path is None or not path.exists():
            raise ConfigLoadError(f"Config not found: {config_path}")
        config, package = self.reading.read(path, config_path.removesuffix(".yaml"))
        header = {"package": self._place(config, package)}
        return ConfigResult(config=config, path=f"{self.scheme()}://{self.path}", provider=self.provider, header=header)

    def available(self) -> bool:
        """Tell Hydra that the folder exists."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Tell Hydra of a group's folder."""
        return _inside(config_path) and (Path(self.path) / config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        """Tell Hydra of an option's file, one that cannot be read too: reading says why."""
        path = self._file(config_path)
        return path is not None and path.exists()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the groups or options below a group."""
        folder = Path(self.path) / config_path
        if not _inside(config_path) or not folder.is_dir():
            return []
        options = [path.stem for path in folder.glob("*.yaml")] if results_filter is not ObjectType.GROUP else []
        groups = [path.name for path in folder.iterdir() if path.is_dir()]
        return sorted({*options, *(groups if results_filter is not ObjectType.CONFIG else [])})

    def _place(self, config: DictConfig, package: str | None) -> str | None:
        return package

    def _file(self, config_path: str) -> Path | None:
        group, _, name = config_path.rpartition("/")
        if not group or not _inside(config_path):  # a file beside the groups is no option
            return None
        return Path(self.path) / group / self._normalize_file_name(name)


class RecipeSource(FolderSource):
    """Serves ``<folder>/<name>.yaml`` as the option ``recipe=<name>``."""

    known: ClassVar[Known]
    """The names that a plain recipe may use."""

    @classmethod
    def full_form(cls, path: Path, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the full form of a plain recipe, and its keys by those of the full form."""
        return full_form(path, raw, cls.known)

    @staticmethod
    def scheme() -> str:
        """Return the scheme of these sources; called by Hydra."""
        return "recipes"

    def is_group(self, config_path: str) -> bool:
        """Tell Hydra the one group, ``recipe``."""
        return config_path in ("", "recipe") and self.available()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the recipes, or the one group."""
        if config_path == "":
            return ["recipe"] if results_filter in (None, ObjectType.GROUP) else []
        if config_path.strip("/") != "recipe" or results_filter is ObjectType.GROUP:
            return []
        return sorted(path.stem for path in Path(self.path).glob("*.yaml"))

    def _place(self, config: DictConfig, package: str | None) -> str | None:
        for key in self.dropped:
            _drop(config, key)
        return "_global_"

    def _file(self, config_path: str) -> Path | None:
        if not config_path.startswith(GROUP) or not _inside(config_path):
            return None
        return Path(self.path) / self._normalize_file_name(config_path.removeprefix(GROUP))


def _inside(config_path: str) -> bool:
    """Return False for a path that leads out of its folder, and for a group of Hydra's own."""
    parts = config_path.split("/")
    return ".." not in parts and parts[0] != HYDRA and not config_path.startswith("/")


def _drop(config: DictConfig, key: str) -> None:
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and leaf in node:
        del node[leaf]


@contextlib.contextmanager
def shipped_resolvers() -> Iterator[None]:
    """Hide every resolver of this process but those that ship.

    One that reads the environment, or of another library, would put into a recipe what its author cannot see.
    """
    others = BaseContainer._resolvers
    BaseContainer._resolvers = {}
    try:
        OmegaConf.register_new_resolver(FROM_VARIANT, _from_variant)
        OmegaConf.register_new_resolver("shipped", lambda path: str(shipped("recipes") / path))
        yield
    finally:
        BaseContainer._resolvers = others


def shadows(chosen: Mapping[str, str]) -> list[str]:
    """Return a line for each chosen option with several files: the one that is used, and those that are not."""
    lines = []
    for choice, name in chosen.items():
        group = choice.partition("@")[0]
        folders = [folder / group for folder in (shipped("conf"), *RecipeSearchPath.conf, *RecipeSearchPath.named)]
        if group == "recipe":
            folders = [*RecipeSearchPath.recipes, *folders]
        found = [path for path in (folder / f"{name}.yaml" for folder in folders) if path.exists()]
        if len({path.resolve() for path in found}) > 1:
            lines.append(f"{group} {name}: {found[0]} is used and shadows {' and '.join(map(str, found[1:]))}")
    return list(dict.fromkeys(lines))
