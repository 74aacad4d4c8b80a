"""The order of the hooks: hookspecs.py lists them as a run calls them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest

from posttrain import hookspecs
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from tests.support.fakes import Script, run_on, states, write_project

LISTED = [name for name, item in vars(hookspecs).items() if hasattr(item, "posttrain_spec")]


def spy(calls: list[str]) -> types.ModuleType:
    """A plugin that implements every hook, answers nothing, and notes each call."""

    def watch(name: str) -> Callable[..., Any]:
        def call() -> Any:
            calls.append(name)
            return [] if name.startswith(("register_", "check_")) else None

        return call

    module = types.ModuleType("plugin_spy")
    for name in LISTED:
        setattr(module, name, hookimpl(watch(name)))
    return module


def test_hooks_are_listed_in_the_order_of_their_calls(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(working_folder)
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, "plugin_spy", spy(calls))
    entry = EntryPoint(name="spy", value="plugin_spy", group=plugins.GROUP)
    host = plugins.load([*entry_points(group=plugins.GROUP), entry])
    watching = host.manager.unregister(name="spy")
    for room in ("scoring", "gate"):
        host.manager.unregister(name=f"{room}.plugin")
    host.manager.register(Script())
    host.manager.register(watching, "spy")  # last, so that no first result keeps a call from it
    run_on(host)
    assert states() == {"sft": "promoted", "dpo": "promoted"}
    assert list(dict.fromkeys(calls)) == LISTED
