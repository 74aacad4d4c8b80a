"""``posttrain show``: the full form of a recipe, with the place that each of its values comes from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config.compose import Composition, compose
from posttrain.config.paths import shipped
from posttrain.config.schema import ROOT
from posttrain.config.settings_file import Reading
from posttrain.config.sources import option_file, shipped_resolvers
from posttrain.errors import BadInput
from posttrain.host import plugins
from posttrain.plan import make_plan
from posttrain.quoting import one_line

ALL = "--all"
DEFAULT = "default"
CHOICES = {"model": "custom", "variant": "lora", "tracker": "none", "launch": "none"}
"""Groups of every recipe, with the options that conf/config.yaml chooses."""


def main(words: list[str]) -> int:
    """Print the full form, defaults too with ``--all``. Raises BadInput with the problems of its plan, once shown."""
    host = plugins.load()
    composition = compose(host, [word for word in words if word != ALL])
    if composition.problems:
        raise BadInput(composition.problems)
    print("\n".join(map(one_line, full_form(composition, everything=ALL in words))))
    make_plan(composition, host)
    return 0


def full_form(composition: Composition, *, everything: bool = False) -> list[str]:
    """Return the lines of the full form: a recipe that composes to the same plan."""
    raw: Any = OmegaConf.to_container(composition.config, resolve=False, enum_to_str=True)
    stages = [key for key in raw if f"stage@{key}" in composition.choices]
    lines = [f"# {composition.recipe} in full; after each value the place that it comes from", "defaults:"]
    lines += [f"  - {key}: {value}" for key, value in _defaults(composition, stages)]
    lines += ["  - _self_"]
    order = [key for key in (*ROOT, *raw) if key in raw and key not in stages and key != "variant"]
    for key in dict.fromkeys([*order, *stages]):
        if found := list(_lines(composition, key, raw[key], "", everything)):
            lines += ["", *found] if isinstance(raw[key], Mapping) else found
    return lines


def _defaults(composition: Composition, stages: list[str]) -> Iterator[tuple[str, str]]:
    choices = composition.choices
    for name in stages:
        yield f"/stage@{name}", choices[f"stage@{name}"]
        if f"gate@{name}.gate" in choices:
            yield f"/gate@{name}.gate", choices[f"gate@{name}.gate"]
    for group, usual in CHOICES.items():
        if choices.get(group, usual) != usual:
            yield f"override /{group}", choices[group]


def _lines(composition: Composition, path: str, value: Any, indent: str, everything: bool) -> Iterator[str]:
    """Yield the lines of one value, or of a mapping with at least one to show."""
    leaf = path.rpartition(".")[2]
    if isinstance(value, Mapping) and value:
        below = [
            line
            for key in value
            if (indent, key) != ("", "kind")
            for line in _lines(composition, f"{path}.{key}", value[key], f"{indent}  ", everything)
        ]
        yield from [f"{indent}{leaf}:", *below] if below else ()
        return
    origin = origin_of(composition, path)
    if leaf == "kind" and path.count(".") == 1 and not path.startswith("launch"):  # the defaults list says it
        return
    if everything or origin != DEFAULT:
        shown = _yaml(_resolved(composition, path, value))
        came = f" by ${{{value[2:-1]}}}" if isinstance(value, str) and value.startswith("${") else ""
        yield f"{indent}{leaf}: {shown}  # {origin}{came}"


def _resolved(composition: Composition, path: str, value: Any) -> Any:
    """Return a value with its interpolations resolved; as it is where they lead nowhere."""
    try:
        with shipped_resolvers():
            found = OmegaConf.select(composition.config, path)
    except OmegaConfBaseException:
        return value
    if OmegaConf.is_config(found):
        return OmegaConf.to_container(found, resolve=False, enum_to_str=True)
    return getattr(found, "value", found) if found is not None else value


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def origin_of(composition: Composition, path: str) -> str:
    """Return the place that a value comes from: a word, a key of a file, or the default."""
    for word in composition.words:
        key, given, _ = word.lstrip("+~").partition("=")
        if given and f"{path}.".startswith(f"{key}."):
            return f"the command line, {word}"
    files = composition.reading.files
    own = f"recipe/{composition.recipe}"
    for name in [own, *(name for name in files if name.startswith("recipe/") and name != own)]:
        if name in files and _holds(files[name][1], path):
            key = _plain_key(composition.reading.origins, path) if name == own else path
            return f"{_near(files[name][0])}: {key}"
    for choice, option in composition.choices.items():
        group, _, place = choice.partition("@")
        inside = path.removeprefix(f"{place or group}.")
        if inside == path or group == "recipe" or (file := option_file(group, option)) is None:
            continue
        if _holds(_settings(file, f"{group}/{option}"), inside):
            return _near(file)
    return DEFAULT


def _plain_key(origins: Mapping[str, str], path: str) -> str:
    """Return the key of a plain recipe that a value of its full form comes from."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        if (found := origins.get(".".join(parts[:length]))) is not None:
            return ".".join([found, *parts[length:]])
    return path


@cache
def _settings(file: Path, name: str) -> Any:
    return OmegaConf.to_container(Reading().read(file, name)[0], resolve=False)


def _holds(raw: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(raw, Mapping) or part not in raw:
            return False
        raw = raw[part]
    return True


def _near(path: Path) -> str:
    """Return a path relative to the working folder; that of a shipped file by its folder and name."""
    for name in ("conf", "recipes"):
        if path.is_relative_to(shipped(name)):
            return f"{name}/{path.relative_to(shipped(name))}"
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near
