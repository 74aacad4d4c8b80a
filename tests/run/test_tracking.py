from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import Script, run_json, run_recipe, write_project


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def service(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    module.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> None:
    write_project(working_folder)


def test_steps_lifts_and_verdicts_are_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    service(monkeypatch, lambda **settings: run)
    run_recipe(Script(), "tracker=wandb")
    assert {"sft/loss": 1.0, "sft/tokens": 10.0} in run.logged
    assert {"sft/lift/some/base": 0.5} in run.logged
    assert run.summary["dpo/verdict"] == "pass"
    assert run.exit_code == 0


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_service_that_fails_never_fails_the_run(
    broken: str, monkeypatch: pytest.MonkeyPatch, working_folder: Path
) -> None:
    def fail(*args: Any, **settings: Any) -> Any:
        raise ConnectionError("unreachable")

    run = FakeRun()
    service(monkeypatch, fail if broken == "init" else lambda **settings: run)
    if broken != "init":
        monkeypatch.setattr(run, broken, fail)
    run_recipe(Script(), "tracker=wandb")
    assert run_json()["state"] == "done"
    shown = (working_folder / "log.txt").read_text()
    assert shown.count("wandb is off for the rest of this run: ConnectionError: unreachable") == 1


def test_the_real_client_logs_offline(working_folder: Path) -> None:
    run_recipe(Script(), "tracker=wandb", "tracker.project=test")
    assert list(working_folder.glob("runs/mine-*/wandb/offline-run-*/*.wandb"))


def test_nothing_is_tracked_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**settings: Any) -> Any:
        raise AssertionError("asked")

    service(monkeypatch, fail)
    run_recipe(Script())
    assert run_json()["state"] == "done"


def test_a_client_that_is_not_installed_is_a_problem_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.errors import BadInput

    monkeypatch.setattr("posttrain.plan.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'posttrain\[wandb\]'"):
        run_recipe(Script(), "tracker=wandb")
