"""The page of public names: current, and with a text for every name and field."""

from __future__ import annotations

from dataclasses import is_dataclass
from types import ModuleType

import pytest

import posttrain
from posttrain.config.help import docstrings
from tests.support.generators import DOCS, load_generator


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator("api")


def test_the_page_of_public_names_is_current(generator: ModuleType) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert page == generator.page(), "run make docs"
    assert [name for name in posttrain.__all__ if f"\n### {name}\n" not in page] == []


def test_every_public_name_has_a_text(generator: ModuleType) -> None:
    paragraphs = {name: generator.entry(name).split("\n\n") for name in posttrain.__all__}
    assert [name for name, found in paragraphs.items() if len(found) < 2] == []
    names = [name for name in posttrain.__all__ if generator.section(getattr(posttrain, name)) == "Names"]
    assert [name for name in names if len(paragraphs[name]) < 3] == []


def test_every_field_and_method_of_a_public_type_has_a_docstring(generator: ModuleType) -> None:
    types = {name: getattr(posttrain, name) for name in posttrain.__all__}
    silent = [
        f"{name}.{field}"
        for name, kind in types.items()
        if is_dataclass(kind)
        for field, text in docstrings(kind).items()
        if not text
    ]
    silent += [
        f"{name}.{generator.signature(method)}"
        for name, kind in types.items()
        if generator.section(kind) == "Types"
        for method in generator.methods(kind)
        if not method.__doc__
    ]
    assert silent == []
