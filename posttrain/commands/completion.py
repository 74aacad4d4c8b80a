"""Completions where Hydra has none: words of commands, options of groups, values of settings."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from posttrain.config.paths import conf_folders, recipe_folders
from posttrain.config.schema import ROOT, EngineName, Method

COMPOSING = ("doctor", "gate", "plan", "show", "tokens")
"""Commands with the words of a recipe, or of a gate."""
FORMATS = ("--format", "output_root=")


def offers(command: str, arguments: list[str], current: str) -> list[str] | None:
    """Return the words that may follow in the line of a command without a recipe; None for one that composes."""
    if command in COMPOSING:
        return None
    found = OFFERS.get(command, lambda arguments: [])(arguments)
    return sorted(word for word in found if word.startswith(current))


def _of_list(arguments: list[str]) -> Iterable[str]:
    from posttrain.commands.list import GROUPS, NODES, SECTIONS, TASKS
    from posttrain.host import plugins

    host = plugins.load()
    if arguments == ["gate"]:
        return _options([folder / GROUPS["gates"] for folder in conf_folders(_folders(host))])
    return [] if arguments else [*SECTIONS, TASKS, *NODES, *host.stages, *host.settings]


def _of_ledger(arguments: list[str]) -> Iterable[str]:
    from posttrain.commands.ledger import ACTIONS

    return [] if arguments else ACTIONS


def _runs(arguments: list[str]) -> Iterable[str]:
    return [path.parent.name for path in Path("runs").glob("*/run.json")]


def _of_runs(arguments: list[str]) -> Iterable[str]:
    return [*FORMATS, *(f"recipe={name}" for name in _options(recipe_folders([])))]


OFFERS: dict[str, Callable[[list[str]], Iterable[str]]] = {
    "init": lambda arguments: ["--model", "--pairs", "--questions", "--name"],
    "leaderboard": lambda arguments: [*FORMATS, "task="],
    "ledger": _of_ledger,
    "list": _of_list,
    "report": _runs,
    "runs": _of_runs,
    "serve": _runs,
}


def values(current: str) -> list[str] | None:
    """Return the words that complete ``key=``, where the key is a group with a place, or has named values."""
    key, given, begun = current.partition("=")
    if not given:
        return None
    from posttrain.host import plugins

    host = plugins.load()
    group, has_place, _ = key.lstrip("+").partition("@")
    if has_place and group == "stage":
        known: Iterable[str] = host.stages
    elif has_place:
        known = _options([folder / group for folder in conf_folders(_folders(host))])
    else:
        known = _named_values(host, key.lstrip("+"))
    found = [f"{key}={value}" for value in known if value.startswith(begun)]
    return sorted(found) or None


def _named_values(host: Any, key: str) -> Iterable[str]:
    """Return the values of an enumeration or of a boolean, found by the types of a stage's settings."""
    first, *rest = key.split(".")
    if not rest:
        kind: Any = EngineName if key == "engine" else Method if key == "method" else None
        return [] if kind is None or key not in (*ROOT, "method") else [each.value for each in kind]
    from posttrain.commands.list import NODES

    declared = host.stages.get(first) or host.settings.get(first) or NODES.get(first)
    kinds = [declared.config] if declared else [stage.config for stage in host.stages.values()]
    for start in kinds:
        kind = start
        for part in rest:
            hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
            kind = hints.get(part) if part in {each.name for each in fields(kind)} else None
            if kind is None:
                break
        choices = [each for each in (*typing.get_args(kind), kind) if isinstance(each, type)]
        for choice in choices:
            if issubclass(choice, Enum):
                return [each.value for each in choice]
            if choice is bool:
                return ["true", "false"]
    return []


def _options(folders: Iterable[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _folders(host: Any) -> list[Path]:
    return [folder for folders in host.folders.values() for folder in folders]
