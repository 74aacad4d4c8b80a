"""Composing a recipe with Hydra, past every problem, so that all of them are reported at once."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from posttrain.config import explain, sources
from posttrain.config.expansion import check_interpolations, leaves, shown_key
from posttrain.config.paths import shipped
from posttrain.config.settings_file import FAULTS, HYDRA, Reading, check_words
from posttrain.errors import BadInput, Problem, reject
from posttrain.host import consent
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
    shadows: tuple[str, ...] = ()
    """A line for each chosen option with a second file of its name, which is not used."""
    problems: list[Problem] = field(default_factory=list)
    choices: Mapping[str, str] = field(default_factory=dict)
    """Chosen options by group and place, such as ``gate@sft.gate``."""
    reading: Reading = field(default_factory=Reading)
    """The files that it was read from."""


def compose(host: Host, overrides: Sequence[str], choice: str = "recipe") -> Composition:
    """Compose the ``recipe`` or ``gate`` that ``overrides`` choose. Raises BadInput when nothing can be composed."""
    remaining, own = _own_folders(overrides)
    check_words(remaining)
    problems: list[Problem] = []
    with _hydra(host, own):
        while True:
            reading = sources.FolderSource.begin()
            try:
                config = hydra.compose(PRIMARY[choice], remaining, return_hydra_config=True)
                break
            except RecursionError:
                chosen = next((word for word in remaining if word.startswith(f"{choice}=")), choice)
                reject(chosen, "is nested without end, or includes itself")
            except (HydraException, OSError, *FAULTS) as error:
                fault = explain.fault(error, remaining, host, choice, reading)
                if fault.instead is not None:
                    remaining[remaining.index(str(fault.override))] = fault.instead
                    continue
                if fault.problem not in problems:
                    problems.append(fault.problem)
                if not _leave_out(fault, remaining) or len(problems) >= MOST_PROBLEMS:
                    raise BadInput(problems) from None
    _require_untouched(config.hydra, PRIMARY[choice])
    choices = {str(key): str(value) for key, value in config.hydra.runtime.choices.items()}
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != HYDRA])
    raw: Any = OmegaConf.to_container(plain, resolve=False)
    check_interpolations(raw, f"{choice} {choices.get(choice)}")
    return Composition(
        recipe=str(choices.get(choice)), config=plain, words=tuple(overrides), removed=removed_stages(remaining),
        tracker=choices.get("tracker", "none"), shadows=tuple(sources.shadows(choices)), problems=problems,
        choices=choices, reading=reading,
    )  # fmt: skip


def sweep(host: Host, words: Sequence[str]) -> list[list[str]]:
    """Return the words of every member of a sweep: each combination of the values between commas.

    Raises BadInput for words that cannot be read.
    """
    overrides, own = _own_folders(words)
    check_words(overrides)
    folders = [word for folder in own for word in ("--config-dir", str(folder))]
    folders += [word for word in words if word == consent.FLAG]
    with _hydra(host, own):
        try:
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            choices = [_values(override) for override in parser.parse_overrides(list(overrides))]
        except (HydraException, *FAULTS) as error:
            raise BadInput(explain.fault(error, overrides, host).problem) from None
    return [[*folders, *member] for member in itertools.product(*choices)]


def _values(override: Override) -> list[str]:
    """Return the words that a word of a sweep stands for."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        reject(str(override.input_line), "has values without number", "Write them with commas between")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def complete(host: Host, words: Sequence[str], primary: str) -> None:
    """Answer the shell about the keys and values of the file ``primary`` below conf/."""
    with _hydra(host):
        GlobalHydra.instance().hydra.shell_completion(primary, list(words))  # type: ignore[union-attr]


@contextlib.contextmanager
def _hydra(host: Host, own: Sequence[Path] = ()) -> Iterator[None]:
    """Prepare Hydra for one composition, in which no resolver exists but those that ship."""
    sources.register(host, own)
    with (
        sources.shipped_resolvers(),  # Hydra registers some of its own, which the inner one hides and this one removes
        hydra.initialize_config_dir(config_dir=str(shipped("conf")), version_base="1.3", job_name=sources.PROGRAM),
        sources.shipped_resolvers(),
        sources.own_store(),
    ):
        yield


def _require_untouched(node: DictConfig, primary: str) -> None:
    """Raise BadInput unless Hydra's own settings are as they were, however a file may have reached them.

    Some of them name code to call, as those of logging, or variables of the environment to copy.
    """
    wanted, found = dict(_own_settings(sources.hydras_settings())), dict(_own_settings(node))
    wanted["job.config_name"] = primary
    changed = [key for key in {**wanted, **found} if (key in wanted, wanted.get(key)) != (key in found, found.get(key))]
    if changed:
        what = "the recipe, or a file that it includes, sets something of Hydra's own: a recipe is data"
        reject(f"hydra.{changed[0]}", what, "Look for packages and keys with hydra in the files, and remove them")


def _own_settings(node: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield Hydra's own settings by dotted name, but for those that describe the composition."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in leaves(raw):
        if not key.startswith(("overrides.", "runtime.", "job.override_dirname")):
            yield key, value


def _own_folders(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Return overrides without our own flags, and the folders of ``--config-dir``. Raises BadInput for a wrong one."""
    remaining: list[str] = []
    folders: list[Path] = []
    waiting = iter(words)
    for word in waiting:
        flag, given, value = word.partition("=")
        if word == consent.FLAG:  # the caller's command line gives it, and no configuration
            continue
        if flag not in CONFIG_DIR:
            remaining.append(word)
            continue
        folder = value if given else next(waiting, "")
        if not folder or not os.path.isdir(folder):
            what = f"there is no directory {shown_key(folder)}" if folder else "names no directory"
            reject(flag, what)
        folders.append(Path(folder).resolve())
    return remaining, folders


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
    if fault.recipe_key and fault.recipe_key not in sources.FolderSource.dropped:
        sources.FolderSource.dropped.add(fault.recipe_key)
        return True
    return False
