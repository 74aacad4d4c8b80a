"""What the documents say is what the code does: the hooks' page."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

from posttrain import hookspecs

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks_page", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_page_of_hooks_is_current(generator: ModuleType) -> None:
    assert (DOCS / "hooks.md").read_text(encoding="utf-8") == generator.page(), "run make docs"


def test_every_hook_is_documented_with_its_signature_and_used_by_a_shipped_plugin(generator: ModuleType) -> None:
    page = (DOCS / "hooks.md").read_text(encoding="utf-8")
    declared = {name for name, item in vars(hookspecs).items() if hasattr(item, "posttrain_spec")}
    assert declared == {hook.name for hook in generator.hooks()}
    for name in declared:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
        _, _, entry = page.partition(f"### {name}\n")
        assert entry.replace(" ", "").startswith(f"\n```python\ndef{name}("), name
        for argument in filter(None, arguments.split(", ")):
            assert f"{argument}:" in entry.split("```")[1]
    for hook in generator.hooks():
        assert hook.text, hook.name
        assert hook.users, f"no shipped plugin uses {hook.name}: delete it"
