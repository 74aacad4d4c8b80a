"""Sources of Hydra: recipes, groups and the schemas of stages.

Registered in this process only: a ``hydra_plugins`` package would reach into every Hydra application of the
environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config.paths import conf_folders, recipe_folders, shipped
from posttrain.config.regression import RegressionConfig
from posttrain.config.schema import (
    FROM_VARIANT,
    Method,
    ModelConfig,
    Source,
    StageConfig,
    from_recipe,
    variant_rates,
)
from posttrain.errors import BadInput, PluginFailed, Problem
from posttrain.host.guard import SETTINGS
from posttrain.host.plugins import Host
from posttrain.stage import Stage

SCHEMA = {"model": ModelConfig, "data": Source}
"""Typed nodes of every recipe, other than its stages and the settings of plugins."""
ALLOWED_RESOLVERS = ("shipped",)
GROUP = "recipe/"


def register(host: Host) -> None:
    """Register every stage, recipe, group and schema of the host with Hydra.

    A plugin with settings that Hydra cannot represent is left out.
    """
    store = ConfigStore.instance()
    store.store(name="regression_schema", node=RegressionConfig)
    variant: dict[str, dict[str, str]] = {}
    _store_settings(store, host, variant)
    plugin_folders = [folder for folders in host.folders.values() for folder in folders]
    conf = conf_folders(plugin_folders)
    for kind, stage in host.stages.items():
        if not any((folder / "stage" / f"{kind}.yaml").exists() for folder in conf):  # it starts from settings
            store.store(group="stage", name=kind, node=_stage_settings(stage, variant))
    own = {name: host.settings[name].config for name in host.own_nodes()}
    typed = {key: OmegaConf.structured(kind) for key, kind in {**SCHEMA, **own}.items()}
    store.store(name="schema", node=OmegaConf.create({**typed, "variant": variant}))
    OmegaConf.register_new_resolver(FROM_VARIANT, _from_variant, replace=True)
    OmegaConf.register_new_resolver("shipped", lambda path: str(shipped("recipes") / path), replace=True)
    RecipeSearchPath.recipes = recipe_folders(plugin_folders)
    RecipeSearchPath.conf = conf[1:]
    plugins = Plugins.instance()
    for plugin in (RecipeSource, RecipeSearchPath):
        plugins.register(plugin)


def _stage_settings(stage: Stage, variant: dict[str, dict[str, str]]) -> StageConfig:
    """Return the settings of ``stage``; defaults that follow the variant become keys of ``variant`` and point there."""
    defaults = {field.name: field.default for field in fields(stage.config) if variant_rates(field.default)}
    if not defaults or stage.name == "method":  # variant.method is taken: the setting keeps its own default
        return stage.config(kind=stage.name)
    variant[stage.name] = {name: str(default) for name, default in defaults.items()}
    return stage.config(kind=stage.name, **{name: from_recipe(f"variant.{stage.name}.{name}") for name in defaults})


def _from_variant(method: str, adapter: float, full: float) -> float:
    return full if method == Method.full.value else adapter


def _store_settings(store: ConfigStore, host: Host, variant: dict[str, dict[str, str]]) -> None:
    """Store the settings of every stage, and those that belong to none, as options of the group ``settings``."""
    for name in (*host.stages, *host.settings):
        if name not in host.stages and name not in host.settings:  # its plugin has just been left out
            continue
        try:
            with host.calling(name, SETTINGS):
                stage = host.stages.get(name)
                node = host.settings[name].config() if stage is None else _stage_settings(stage, variant)
                store.store(group="settings", name=name, node=node)
        except PluginFailed as failure:
            host.leave_out(name, failure)


class RecipeSearchPath(SearchPathPlugin):
    """Adds the folders of recipes and of plugins to Hydra's search path."""

    recipes: ClassVar[list[Path]] = []
    conf: ClassVar[list[Path]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folders; called by Hydra."""
        for folder in self.recipes:
            search_path.append("recipes", f"recipes://{folder}")
        for folder in self.conf:
            search_path.append("plugin", f"file://{folder}")


class RecipeSource(ConfigSource):
    """Serves ``<folder>/<name>.yaml`` as the option ``recipe=<name>``."""

    dropped: ClassVar[set[str]] = set()
    """Dotted keys to leave out: each is reported already, and composing continues to find the next."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of these sources; called by Hydra."""
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a recipe as data: no ``hydra`` keys, no ``_target_``, no resolver that reads the environment."""
        path = self._file(config_path)
        if path is None or not path.is_file():
            raise ConfigLoadError(f"Config not found: {config_path}")
        text = path.read_text(encoding="utf-8")
        try:
            config = OmegaConf.create(text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise BadInput(
                Problem(where=str(path), what=f"is not sound YAML: {' '.join(str(error).split())}")
            ) from None
        if not isinstance(config, DictConfig):
            raise BadInput(
                Problem(where=str(path), what="a recipe must be a mapping", fix="See recipes/quickstart.yaml")
            )
        reject_code(config, path)
        for key in self.dropped:
            _drop(config, key)
        header = {**self._get_header_dict(text), "package": "_global_"}
        return ConfigResult(config=config, path=f"{self.scheme()}://{self.path}", provider=self.provider, header=header)

    def available(self) -> bool:
        """Tell Hydra that the folder exists."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Tell Hydra the one group, ``recipe``."""
        return config_path in ("", "recipe") and self.available()

    def is_config(self, config_path: str) -> bool:
        """Tell Hydra of a recipe's file."""
        path = self._file(config_path)
        return path is not None and path.is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the recipes, or the one group."""
        if config_path == "":
            return ["recipe"] if results_filter in (None, ObjectType.GROUP) else []
        if config_path.strip("/") != "recipe" or results_filter is ObjectType.GROUP:
            return []
        return sorted(path.stem for path in Path(self.path).glob("*.yaml"))

    def _file(self, config_path: str) -> Path | None:
        if not config_path.startswith(GROUP):
            return None
        return Path(self.path) / self._normalize_file_name(config_path.removeprefix(GROUP))


def reject_code(config: DictConfig, path: Path) -> None:
    """Raise BadInput for anything but data in a recipe: a stranger may have written it."""
    for key, value in _walk(config):
        if key.split(".")[0] == "hydra" or key.split(".")[-1].startswith("_target_"):
            raise BadInput(
                Problem(where=f"{path}: {key}", what="a recipe is data and cannot set this", fix="Remove the key")
            )
        for resolver in re.findall(r"\$\{\s*([\w.]+)\s*:", str(value)):
            if resolver not in ALLOWED_RESOLVERS:
                raise BadInput(
                    Problem(
                        where=f"{path}: {key}",
                        what=f"a recipe cannot use the resolver {resolver!r}",
                        fix=f"Write the value itself; allowed resolvers: {', '.join(ALLOWED_RESOLVERS)}",
                    )
                )


def _walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    raw: Any = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else node
    items = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in items:
        dotted = f"{prefix}{key}"
        yield dotted, value if not isinstance(value, (dict, list)) else ""
        if isinstance(value, (dict, list)):
            yield from _walk(value, f"{dotted}.")


def _drop(config: DictConfig, key: str) -> None:
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and leaf in node:
        del node[leaf]
