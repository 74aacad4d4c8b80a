"""The page and the schema of settings: current, and true of every recipe that ships."""

from __future__ import annotations

import json
import re
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from posttrain.config.paths import shipped
from tests.support.generators import DOCS, load_generator

KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator("settings")


def test_page_and_schema_are_current(generator: ModuleType) -> None:
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == generator.page(), "run make docs"
    assert (DOCS / "recipe.schema.json").read_text(encoding="utf-8") == generator.schema(), "run make docs"


def read(text: str) -> Any:
    """Read YAML as recipes are read, and editors do: 1e-3 is a number."""
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def fits(value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Check a value against the parts of JSON Schema that the generator uses."""
    if "$ref" in schema:
        return fits(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return any(fits(value, each, whole) for each in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "pattern" in schema:
        return isinstance(value, str) and ("${" in value or value == "???")
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(value is None if kind == "null" else isinstance(value, KINDS[kind]) for kind in kinds):
        return False
    if not isinstance(value, dict) or "properties" not in schema:
        return True
    found = {key: _property(key, schema) for key in value}
    return all(known is not None and fits(value[key], known, whole) for key, known in found.items())


def _property(key: str, schema: dict[str, Any]) -> dict[str, Any] | None:
    patterns = schema.get("patternProperties", {}).items()
    return schema["properties"].get(key, next((each for pattern, each in patterns if re.search(pattern, key)), None))


PLAIN = (
    "model: a/b\ndata: c.jsonl\nrank: 8\nlr: 0.001\nepochs: 1\nspend_cap: 5 USD\ngate: {name: local, data: q.jsonl}\n"
)


def test_the_schema_takes_every_shipped_recipe_and_no_misspelt_one() -> None:
    schema = json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8"))
    for path in shipped("recipes").glob("*.yaml"):
        assert fits(read(path.read_text(encoding="utf-8")), schema, schema), path.name
    assert fits(read(PLAIN), schema, schema)
    faults = "lrr: 1", "sft: {epochs: x}", "dpo2: {epochs: x}", "sft: {gate: {on_fail: no}}", "model: {pth: x}"
    for wrong in faults:
        assert not fits(read(PLAIN) | read(wrong), schema, schema), wrong
