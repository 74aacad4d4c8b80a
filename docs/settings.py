"""Writes docs/settings.md and docs/recipe.schema.json from the dataclasses of settings: ``make docs``."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from posttrain.commands.list import NODES, PLACES
from posttrain.config.help import docstrings, settings
from posttrain.config.plain import CHOICES
from posttrain.config.schema import ROOT
from posttrain.host import plugins

PAGE = Path(__file__).with_suffix(".md")
SCHEMA = Path(__file__).with_name("recipe.schema.json")
INTRODUCTION = """\
# Settings

Written by `make docs` from the dataclasses of the settings; `posttrain list NAME` prints the same. An editor checks a
recipe against [recipe.schema.json](recipe.schema.json) when its first line is
`# yaml-language-server: $schema=PATH/docs/recipe.schema.json`.
"""
BASIC = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
shared: dict[str, Any] = {}
"""Schemas of nested dataclasses, by name."""
INTERPOLATION = {"type": "string", "pattern": r"\$\{.*\}|\?\?\?"}
"""A value from another key, or one that is yet to be given."""


def declared() -> dict[str, Any]:
    """Return the settings of every stage that ships, and of every node, by name."""
    host = plugins.load()
    stages = {name: stage for name, stage in host.stages.items() if host.owner(name).is_ours}
    return {**stages, **NODES}


def page() -> str:
    """Return the reference page."""
    blocks = [INTRODUCTION]
    for name, each in declared().items():
        place = PLACES.get(name, name)
        lines = [f"## {name}", "", f"{each.summary}.", "", "| setting | type | default | |", "|---|---|---|---|"]
        for row in settings(each.config):
            if name in NODES or not row.name.startswith(("gate.", "lora.")):
                cells = (f"`{place}.{row.name}`", f"`{row.type}`", f"`{row.default}`", row.help)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def schema() -> str:
    """Return the JSON schema of a recipe, plain or in full."""
    host = plugins.load()
    stages = {name: of_dataclass(each.config) for name, each in declared().items() if name in host.stages}
    gate = {"anyOf": [{"type": ["string", "null", "boolean"]}, of_dataclass(NODES["gate"].config, "name", "data")]}
    for each in stages.values():
        each["properties"] |= {"gate": {"$ref": "#/$defs/gate"}, "rank": {"type": "integer"}}
    named = {"type": ["string", "object", "null"]}
    flat = {key: value for key, value in stages["sft"]["properties"].items() if key not in ("kind", "data")}
    properties = {
        **flat,
        **{key: {} for key in ROOT},
        **dict.fromkeys(CHOICES, named),
        **{name: {"$ref": f"#/$defs/stage_{name}"} for name in stages},
        "gate": {"$ref": "#/$defs/gate"},
    }
    properties |= {
        "defaults": {"type": "array"},
        "model": {"anyOf": [{"type": "string"}, of_dataclass(NODES["model"].config, "name")]},
        "data": {"anyOf": [{"type": "string"}, of_dataclass(NODES["source"].config), {"type": "array"}]},
        "method": {"enum": sorted(stages)},
        "stages": {"type": ["array", "object", "null"]},
        "spend_cap": {"type": ["string", "null"], "description": "Most that a run may spend: 5 USD, or 2 hours"},
    }
    shared.update({f"stage_{name}": each for name, each in stages.items()})
    # a second stage of a kind is dpo2
    head: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of posttrain",
        "type": "object",
        "patternProperties": {f"^{name}[0-9]+$": {"$ref": f"#/$defs/stage_{name}"} for name in stages},
    }
    shared["interpolation"], shared["gate"] = INTERPOLATION, gate
    return json.dumps({**head, "properties": properties, "$defs": shared}, indent=1, sort_keys=True) + "\n"


def of_dataclass(kind: type, *others: str) -> dict[str, Any]:
    """Return the schema of a dataclass, with keys beside its fields; a stage may be empty."""
    texts, hints = docstrings(kind), typing.get_type_hints(kind)
    found = {each.name: of_type(hints[each.name]) | {"description": texts[each.name]} for each in fields(kind)}
    for each in fields(kind):
        default = each.default.value if isinstance(each.default, Enum) else each.default
        plain = default is not MISSING and isinstance(default, str | int | float | bool)
        if plain and not str(default).startswith(("$", "???")):
            found[each.name]["default"] = default
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": found | {key: {} for key in others},
    }


def of_type(hint: Any) -> dict[str, Any]:
    """Return the schema of a type; every value may be an interpolation."""
    found = [*_alternatives(hint), {"$ref": "#/$defs/interpolation"}]
    return {"anyOf": found} if hint is not Any else {}


def _alternatives(hint: Any) -> list[dict[str, Any]]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [found for each in typing.get_args(hint) for found in _alternatives(each)]
    if hint is type(None):
        return [{"type": "null"}]
    if is_dataclass(hint) and isinstance(hint, type):
        shared[hint.__name__] = of_dataclass(hint)
        return [{"$ref": f"#/$defs/{hint.__name__}"}]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [{"enum": [each.value for each in hint]}]
    return [{"type": BASIC.get(typing.get_origin(hint) or hint, "object")}]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
    print(f"{PAGE} and {SCHEMA} are written")
