"""Objects that a plugin adds to one run: they hear of this run alone, under their plugin's name, and go with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import GateFailed, PluginFailed
from posttrain.hookspecs import hookimpl
from posttrain.plan import Plan
from tests.support.fakes import Script, run_json, run_on, run_recipe, scripted_host, write_project
from tests.support.installed import install

ADDING = """\
from posttrain import hookimpl

class Listener:
    {decorator}
    def {hook}(self, {arguments}):
        {action}

@hookimpl
def run_started(plan, directory):
    return Listener()
"""


class Listener:
    def __init__(self, plan: Plan, directory: Path) -> None:
        self.seed, self.directory = plan.seed, directory
        self.heard: list[str] = []

    @hookimpl
    def step_logged(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.heard.append(f"{stage} {step}")

    @hookimpl
    def run_finished(self, directory: Path, state: str) -> None:
        assert directory == self.directory
        self.heard.append(state)


class Adding:
    """A plugin that adds a listener to every run."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []

    @hookimpl
    def run_started(self, plan: Plan, directory: Path) -> object:
        self.listeners.append(Listener(plan, directory))
        return self.listeners[-1]


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> None:
    write_project(working_folder)


def adding(folder: Path, monkeypatch: pytest.MonkeyPatch, hook: str, arguments: str, action: str) -> None:
    """Install the plugin ``bad``, which adds an object with one hook to every run."""
    text = ADDING.format(decorator="@hookimpl", hook=hook, arguments=arguments, action=action)
    install(folder / "site", monkeypatch, "bad", {f"bad_adding_{abs(hash(str(folder)))}.py": text})


def test_each_run_of_one_host_is_heard_by_its_own_listener_alone() -> None:
    plugin = Adding()
    host = scripted_host(Script(), plugin)
    before = host.manager.get_plugins()
    for seed in (1, 2):
        run_on(host, f"seed={seed}")
        assert host.manager.get_plugins() == before
    assert [(each.seed, each.heard) for each in plugin.listeners] == [
        (1, ["sft 1", "dpo 1", "done"]), (2, ["sft 1", "dpo 1", "done"]),
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["a gate", "a stage", "another plugin"])
def test_it_is_gone_however_the_run_ends(fault: str) -> None:
    plugin, script = Adding(), Script()

    class Late:
        @hookimpl(tryfirst=True)
        def run_started(self) -> object:
            if fault == "another plugin":
                raise RuntimeError("out of order")
            return None

    def fail(context: Any) -> None:
        raise RuntimeError("out of order")

    if fault == "a gate":
        script.verdicts["sft"] = "fail"
    if fault == "a stage":
        script.during_training = fail
    host = scripted_host(script, Late(), plugin)  # called last first
    before = host.manager.get_plugins()
    with pytest.raises((GateFailed, RuntimeError)):
        run_on(host)
    assert host.manager.get_plugins() == before
    ending = "gate_failed" if fault == "a gate" else "failed"
    assert [each.heard[-1] for each in plugin.listeners] == [ending]
    assert run_json()["state"] == ending


@pytest.mark.parametrize(
    ("hook", "arguments", "action", "says"),
    [
        ("step_logged", "stage", "raise RuntimeError('no')", "(bad-plugin 1.0) in step_logged: RuntimeError: no"),
        ("run_finished", "state", "raise RuntimeError('no')", "(bad-plugin 1.0) in run_finished: RuntimeError: no"),
        ("step_logged", "stage", "return 3", "(bad-plugin 1.0) in step_logged: it answered 3"),
        ("step_loged", "stage", "pass", "(bad-plugin 1.0) in run_started: unknown hook 'step_loged'"),
        ("step_logged", "stagge", "pass", "(bad-plugin 1.0) in run_started: "),
    ],
)
def test_its_faults_are_its_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str, arguments: str, action: str, says: str
) -> None:
    adding(tmp_path, monkeypatch, hook, arguments, action)
    with pytest.raises(PluginFailed) as caught:
        run_recipe(Script())
    assert f"plugin bad {says}" in str(caught.value)
    assert run_json()["state"] == ("done" if hook == "run_finished" else "failed")


def test_one_that_reads_records_is_named_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.artifact import verify

    adding(tmp_path, monkeypatch, "load_records", "step", "return None")
    run = run_recipe(Script())
    assert verify(run.path / "stages/sft/artifact").manifest.plugins == ("bad (bad-plugin 1.0)",)
