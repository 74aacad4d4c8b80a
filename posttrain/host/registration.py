"""Rules for what a plugin may register: hooks of this API, stages and settings with free names, files that exist."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from posttrain import hookspecs
from posttrain.config.schema import ROOT
from posttrain.errors import PluginFailed
from posttrain.host.readers import OWN_ENDINGS, Reader
from posttrain.rewards.reward import Reward
from posttrain.stage import RECORD_SHAPES, Settings, Stage, StageConfig

if TYPE_CHECKING:
    from posttrain.host.plugins import Host

RECIPES = "recipes"
NAME = re.compile(r"[a-z][a-z0-9_]*")
ENDING = re.compile(r"\.[a-z][a-z0-9]*")
CONSTANTS = ("null", "true", "false", "yes", "no", "on", "off", "inf", "nan")
"""Words that YAML or the command line reads as a value: no stage can have one as its name."""
NAMES = "lower-case letters, digits and _, beginning with a letter, and no value of YAML such as nan or on"
OTHER_RULES = (
    "exact", "near", "contamination", "semantic", "unreadable", "language",
    "length", "source", "group", "refused", "helpful", "sample",
)  # fmt: skip
"""Names of the ledger's findings that are no rules on single rows."""
GROUPS_WITH_SETTINGS = ("tracker",)
"""Groups whose options are plugins that own their settings."""
TASK_NAME = re.compile(r"""^task:[ ]*["']?([\w.:-]+)["']?[ ]*(?:#.*)?$""", re.MULTILINE)
"""The line of a task file that names the task; read without a YAML parser, which would slow down every command."""


def ask(manager: pluggy.PluginManager, plugin: object, hook: str) -> list[Any]:
    """Return one plugin's answer to a collecting hook."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    answers = manager.subset_hook_caller(hook, others).__call__()
    return [item for answer in answers for item in answer]


def ask_folders(manager: pluggy.PluginManager, plugin: object, hook: str) -> list[Path]:
    """Return one plugin's answer to a hook that names folders. Raises PluginFailed when one does not exist."""
    folders = ask(manager, plugin, hook)
    if not all(isinstance(folder, Path) for folder in folders):
        raise PluginFailed(f"{hook} must return paths")
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise PluginFailed(f"{hook} names {absent[0]}, which is no folder")
    return folders


def find_options(recipes: Path, conf: Path) -> dict[str, Path]:
    """Return the recipes in one folder and the options of groups in the other."""
    found = {f"{RECIPES}/{path.stem}": path for path in recipes.glob("*.yaml")}
    return found | {f"{path.parent.name}/{path.stem}": path for path in conf.glob("*/*.yaml")}


def find_tasks(folders: Iterable[Path]) -> dict[str, Path]:
    """Return the task files of some folders by the names of their tasks; a file without a name is only included."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            if name := TASK_NAME.search(path.read_text(encoding="utf-8")):
                if name[1] in found:
                    raise PluginFailed(f"{path} and {found[name[1]]} both define the task {name[1]!r}")
                found[name[1]] = path.resolve()
    return found


def check_api(plugin: object) -> None:
    """Raise PluginFailed for a plugin of another API version."""
    wanted = getattr(plugin, "POSTTRAIN_API", hookspecs.API_VERSION)
    if wanted != hookspecs.API_VERSION:
        raise PluginFailed(f"it is written for plugin API {wanted}; this posttrain has {hookspecs.API_VERSION}")


def check_hook_names(manager: pluggy.PluginManager, plugin: object) -> None:
    """Raise PluginFailed for a hook without a specification: pluggy alone would silently never call it."""
    for caller in manager.get_hookcallers(plugin) or []:
        if not caller.has_spec():
            implementation = next(impl for impl in caller.get_hookimpls() if impl.plugin is plugin)
            if not implementation.optionalhook:
                raise PluginFailed(f"unknown hook {caller.name!r}")


def check_option(host: Host, option: str, path: Path) -> None:
    """Raise PluginFailed for a file that another one of its name would hide."""
    group, _, name = option.partition("/")
    if option in host.options:
        raise PluginFailed(f"{path}: the name {name!r} is taken by {host.options[option]}")
    if group == "stage" and name in host.stages:
        raise PluginFailed(f"{path}: the stage {name!r} is that of {host.origin(name)}")


def is_stage_name(name: str) -> bool:
    """Return True when recipes and the command line can use ``name`` without quotes."""
    return NAME.fullmatch(name) is not None and name not in CONSTANTS


def check_stage(host: Host, stage: object) -> None:
    """Raise PluginFailed for a stage that cannot be used, or whose name is taken."""
    if not isinstance(stage, Stage):
        raise PluginFailed(f"register_stages must return Stage objects, not {type(stage).__name__}")
    if not is_stage_name(stage.name):
        raise PluginFailed(f"{stage.name!r} cannot be the name of a stage: {NAMES}")
    _check_free(host, stage.name, "the stage")
    config = stage.config
    if not (isinstance(config, type) and issubclass(config, StageConfig) and "__dataclass_fields__" in vars(config)):
        raise PluginFailed(f"the config of stage {stage.name!r} must be a dataclass that inherits from StageConfig")
    if stage.parent not in ("base", "sft"):
        raise PluginFailed(f"the parent of stage {stage.name!r} must be 'base' or 'sft', not {stage.parent!r}")
    if stage.records not in RECORD_SHAPES:
        raise PluginFailed(f"stage {stage.name!r} asks for {stage.records!r}; shapes are {', '.join(RECORD_SHAPES)}")
    if stage.run.count(":") != 1:
        raise PluginFailed(f"run of stage {stage.name!r} must read 'package.module:function', not {stage.run!r}")


def check_settings(host: Host, settings: object) -> None:
    """Raise PluginFailed for settings that cannot be used, or whose name is taken."""
    if not isinstance(settings, Settings):
        raise PluginFailed(f"register_settings must return Settings objects, not {type(settings).__name__}")
    name, config, group = settings.name, settings.config, settings.group
    if not is_stage_name(name):
        raise PluginFailed(f"{name!r} cannot be the name of settings: {NAMES}")
    _check_free(host, name, "the name")
    if group is None and name in ROOT:
        raise PluginFailed(f"settings cannot be named {name!r}: every recipe has a key of this name")
    if group is not None and group not in GROUPS_WITH_SETTINGS:
        raise PluginFailed(f"the group of settings {name!r} must be {' or '.join(GROUPS_WITH_SETTINGS)}, not {group!r}")
    if not (isinstance(config, type) and "__dataclass_fields__" in vars(config)):
        raise PluginFailed(f"the config of settings {name!r} must be a dataclass")


def check_reward(host: Host, reward: object) -> None:
    """Raise PluginFailed for a reward that cannot be used, or whose name is taken."""
    if not isinstance(reward, Reward):
        raise PluginFailed(f"register_rewards must return Reward objects, not {type(reward).__name__}")
    if not is_stage_name(reward.name):
        raise PluginFailed(f"{reward.name!r} cannot be the name of a reward: {NAMES}")
    if reward.name in host.rewards:
        raise PluginFailed(f"the reward {reward.name!r} is already registered by {host.reward_owners[reward.name]}")
    if (reward.score is None) == (reward.open is None):
        raise PluginFailed(f"the reward {reward.name!r} must have either score or open")
    if isinstance(reward.version, bool) or not isinstance(reward.version, int):
        raise PluginFailed(f"the version of reward {reward.name!r} must be a whole number, not {reward.version!r}")


def check_filter(host: Host, each: object) -> None:
    """Raise PluginFailed for a filter of rows that cannot be used, or whose name is taken."""
    name, version = getattr(each, "name", None), getattr(each, "version", None)
    if not isinstance(name, str) or not isinstance(version, str) or not callable(getattr(each, "judge", None)):
        raise PluginFailed(f"register_filters must return objects with name, version and judge, not {each!r:.80}")
    if not is_stage_name(name):
        raise PluginFailed(f"{name!r} cannot be the name of a filter: {NAMES}")
    if name in OTHER_RULES:
        raise PluginFailed(f"the filter {name!r} has the name of a finding of posttrain")
    if name in host.filters:
        raise PluginFailed(f"the filter {name!r} is already registered by {host.filters[name][0]}")


def check_reader(host: Host, reader: object) -> None:
    """Raise PluginFailed for a reader of files that cannot be used, or whose ending is taken."""
    if not isinstance(reader, Reader):
        raise PluginFailed(f"register_readers must return Reader objects, not {type(reader).__name__}")
    if not isinstance(reader.version, str) or not callable(reader.read):
        raise PluginFailed(f"the reader {reader.name!r} needs a version, a text, and read, a function")
    if not isinstance(reader.suffix, str) or not ENDING.fullmatch(reader.suffix):
        raise PluginFailed(f"{reader.suffix!r} cannot be the ending of a reader: a dot, lower-case letters and digits")
    if reader.suffix in OWN_ENDINGS or reader.suffix in host.readers:
        raise PluginFailed(f"the ending {reader.suffix} of reader {reader.name!r} is read already")


def _check_free(host: Host, name: str, what: str) -> None:
    if name in host.stages or name in host.settings:
        raise PluginFailed(f"{what} {name!r} is already registered by {host.origin(name)}")
