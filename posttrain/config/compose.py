"""Composing a recipe with Hydra, past every problem, so that all of them are reported at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from posttrain.config import explain, sources
from posttrain.config.paths import shipped
from posttrain.errors import BadInput, Problem
from posttrain.host.plugins import Host

PRIMARY = {"recipe": "config", "gate": "regression"}
"""The file below conf/ that a composition starts from, by what is chosen in it."""
CONFIG_DIR = ("--config-dir", "-cd")
"""Flags that name a folder of the user's own gates, models and variants."""
MOST_PROBLEMS = 20
"""Problems after which composing stops: each costs another composition."""


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A recipe, or a gate for one adapter, with its overrides applied, and its problems."""

    recipe: str
    """Name of the recipe or gate."""
    config: DictConfig
    words: tuple[str, ...]
    """The command line."""
    removed: frozenset[str]
    """Stage nodes taken out with ``~stage@name``."""
    tracker: str = "none"
    """Chosen option of the group ``tracker``."""
    problems: list[Problem] = field(default_factory=list)


def compose(host: Host, overrides: Sequence[str], choice: str = "recipe") -> Composition:
    """Compose the ``recipe`` or ``gate`` that ``overrides`` choose. Raises BadInput when nothing can be composed."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of ending the process
    sources.register(host)
    sources.RecipeSource.dropped = set()
    problems: list[Problem] = []
    remaining = _searching(overrides)
    with hydra.initialize_config_dir(config_dir=str(shipped("conf")), version_base="1.3", job_name="posttrain"):
        while True:
            try:
                config = hydra.compose(PRIMARY[choice], remaining, return_hydra_config=True)
                break
            except (HydraException, OSError, yaml.YAMLError, UnicodeDecodeError) as error:
                fault = explain.fault(error, remaining, host)
                if fault.instead is not None:
                    remaining[remaining.index(str(fault.override))] = fault.instead
                    continue
                if fault.problem not in problems:
                    problems.append(fault.problem)
                if not _leave_out(fault, remaining) or len(problems) >= MOST_PROBLEMS:
                    raise BadInput(problems) from None
    choices = config.hydra.runtime.choices
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return Composition(
        recipe=str(choices.get(choice)), config=plain, words=tuple(overrides), removed=removed_stages(remaining),
        tracker=str(choices.get("tracker", "none")), problems=problems,
    )  # fmt: skip


def _searching(words: Sequence[str]) -> list[str]:
    """Turn ``--config-dir DIR`` into Hydra's search path. Raises BadInput when there is no such directory."""
    remaining: list[str] = []
    folders: list[str] = []
    waiting = iter(words)
    for word in waiting:
        flag, given, value = word.partition("=")
        if flag not in CONFIG_DIR:
            remaining.append(word)
            continue
        folder = value if given else next(waiting, "")
        if not folder or not Path(folder).is_dir():
            what = f"there is no directory {folder}" if folder else "names no directory"
            raise BadInput(Problem(where=flag, what=what))
        path = str(Path(folder).resolve()).replace("'", "\\'")
        folders.append(f"'file://{path}'")
    return [*remaining, f"hydra.searchpath=[{','.join(folders)}]"] if folders else remaining


def removed_stages(overrides: Sequence[str]) -> frozenset[str]:
    """Return the stage nodes that ``~stage@name`` takes out; Hydra leaves the recipe's settings of them behind."""
    return frozenset(o.removeprefix("~stage@").split("=")[0] for o in overrides if o.startswith("~stage@"))


def _leave_out(fault: explain.Fault, overrides: list[str]) -> bool:
    """Remove the faulty override or recipe key. Return False when composing must stop."""
    if fault.override is not None:
        if fault.fatal:
            return False
        overrides.remove(fault.override)
        return True
    if fault.recipe_key and fault.recipe_key not in sources.RecipeSource.dropped:
        sources.RecipeSource.dropped.add(fault.recipe_key)
        return True
    return False
