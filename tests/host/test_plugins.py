from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.compose import compose
from posttrain.config.schema import GateConfig
from posttrain.config.typed import conform_gate_tasks
from posttrain.errors import BadInput, Problem
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.plan import make_plan
from posttrain.scoring.checks import check_tasks
from posttrain.stage import Stage, StageConfig
from tests.support.installed import command, install


def entry(name: str, monkeypatch: pytest.MonkeyPatch, **members: Any) -> EntryPoint:
    """An entry point to a module made of ``members``."""
    module = types.ModuleType(f"plugin_{name}")
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return EntryPoint(name=name, value=module.__name__, group=plugins.GROUP)


def stage(name: str = "mine", **settings: Any) -> Stage:
    values: dict[str, Any] = {
        "name": name,
        "summary": "a stage",
        "config": StageConfig,
        "run": "package.module:run",
        "parent": "sft",
        "records": "preferences",
    }
    return Stage(**{**values, **settings})


def registering(*stages: Any) -> Any:
    @hookimpl
    def register_stages() -> Any:
        return list(stages)

    return register_stages


def test_first_party_stages_are_found_by_their_entry_points() -> None:
    host = plugins.load()
    assert {"sft", "dpo"} <= set(host.stages)
    assert not host.failures()


def test_a_third_party_stage_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    host = plugins.load([entry("mine", monkeypatch, register_stages=registering(stage()))])
    assert host.stages["mine"].summary == "a stage"
    assert host.plugins["mine"].stages == ("mine",)


def bad_plugins(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[EntryPoint, str]]:
    @hookimpl
    def register_stage() -> Any:
        return []

    @hookimpl
    def step_logged(stage: str, stepp: int) -> None: ...

    @hookimpl
    def register_stages() -> Any:
        raise RuntimeError("out of order")

    class NoConfig:
        pass

    return {
        "absent": (EntryPoint(name="absent", value="no_such_module", group=plugins.GROUP), "No module named"),
        "misspelt": (entry("misspelt", monkeypatch, register_stage=register_stage), "unknown hook 'register_stage'"),
        "arguments": (entry("arguments", monkeypatch, step_logged=step_logged), "stepp"),
        "raising": (entry("raising", monkeypatch, register_stages=register_stages), "out of order"),
        "future": (entry("future", monkeypatch, POSTTRAIN_API=99), "plugin API 99"),
        "taken": (entry("taken", monkeypatch, register_stages=registering(stage("sft"))), "already registered"),
        "wrong": (entry("wrong", monkeypatch, register_stages=registering("sft")), "must return Stage objects"),
        "config": (entry("config", monkeypatch, register_stages=registering(stage(config=NoConfig))), "StageConfig"),
        "parent": (
            entry("parent", monkeypatch, register_stages=registering(stage(parent="x"))),
            "must be 'base' or 'sft'",
        ),
        "records": (entry("records", monkeypatch, register_stages=registering(stage(records="x"))), "asks for 'x'"),
        "name": (entry("name", monkeypatch, register_stages=registering(stage("null"))), "'null' cannot be the name"),
        "words": (entry("words", monkeypatch, register_stages=registering(stage("two words"))), "cannot be the name"),
        "run": (entry("run", monkeypatch, register_stages=registering(stage(run="x"))), "package.module:function"),
    }


def test_each_broken_plugin_is_named_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = bad_plugins(monkeypatch)
    good = entry("good", monkeypatch, register_stages=registering(stage("good")))
    host = plugins.load([*(found for found, _ in bad.values()), good])
    for name, (_, reason) in bad.items():
        assert host.plugins[name].state == "failed"
        assert reason in host.plugins[name].reason
        assert not host.manager.has_plugin(name)
    assert host.plugins["good"].state == "loaded"
    assert set(host.stages) == {"sft", "good"}


def test_a_plugin_that_exits_while_it_is_imported_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exiting:
        def load(self) -> None:
            sys.exit(1)

        name, value, dist = "exiting", "exiting", None

    host = plugins.load([Exiting()])  # type: ignore[list-item]
    assert "SystemExit" in host.plugins["exiting"].reason


def test_blocked_plugins_are_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_BLOCK_PLUGINS", "absent, other")
    host = plugins.load([EntryPoint(name="absent", value="no_such_module", group=plugins.GROUP)])
    assert host.plugins["absent"].state == "blocked"


def test_essentials_cannot_be_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_BLOCK_PLUGINS", "sft.plugin,gate.plugin")
    assert "sft" in plugins.load([]).stages


def test_one_plugin_cannot_take_the_name_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    first = entry("same", monkeypatch, register_stages=registering(stage("one")))
    second = EntryPoint(name="same", value="posttrain_preference", group=plugins.GROUP)
    host = plugins.load([first, second])
    assert host.plugins["same"].stages == ("one",)
    assert [info.reason for info in host.failures()] == ["the name 'same' is taken"]


TASK_FILE = "task: {name}  # a comment\ndataset_path: json\nmetric_list:\n  - {{metric: acc, aggregation: mean}}\n"


def bringing_tasks(*folders: Path) -> Any:
    @hookimpl
    def register_eval_tasks() -> Any:
        return list(folders)

    return register_eval_tasks


def test_tasks_of_a_plugin_are_known_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "polite.yaml").write_text(TASK_FILE.format(name="polite"))
    (tmp_path / "common.yaml").write_text("dataset_path: json\n")  # to be included
    host = plugins.load([entry("mine", monkeypatch, register_eval_tasks=bringing_tasks(tmp_path))])
    assert host.tasks["polite"] == tmp_path / "polite.yaml"
    assert "common" not in host.tasks
    gate = GateConfig(
        tasks={
            "polite": {"role": "lift", "metric": "acc"},
            "again": {"role": "guard", "metric": "acc", "task": "polite"},
            "gsm8k": {"role": "guard", "metric": "exact_match"},
        }
    )
    problems: list[Problem] = []
    found = conform_gate_tasks("sft.gate", gate, host, problems)
    assert {name: task.task for name, task in found.items()} == {
        "polite": str(tmp_path / "polite.yaml"),
        "again": str(tmp_path / "polite.yaml"),
        "gsm8k": None,
    }
    del found["gsm8k"]
    assert [*problems, *check_tasks(found)] == []


def test_a_task_is_registered_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "polite.yaml").write_text(TASK_FILE.format(name="polite"))
    first = entry("first", monkeypatch, register_eval_tasks=bringing_tasks(tmp_path / "one"))
    second = entry("second", monkeypatch, register_eval_tasks=bringing_tasks(tmp_path / "two"))
    twice = entry("twice", monkeypatch, register_eval_tasks=bringing_tasks(tmp_path / "two", tmp_path / "two"))
    absent = entry("absent", monkeypatch, register_eval_tasks=bringing_tasks(tmp_path / "three"))
    host = plugins.load([first, second])
    assert host.tasks["polite"] == tmp_path / "one" / "polite.yaml"
    assert "'polite' is already registered" in host.plugins["second"].reason
    reasons = [info.reason for info in plugins.load([twice, absent]).failures()]
    assert "three, which is no folder" in reasons[0]
    assert "both define the task 'polite'" in reasons[1]


def bringing_files(*folders: Path) -> Any:
    @hookimpl
    def register_config() -> Any:
        return list(folders)

    return register_config


@pytest.mark.parametrize("file", ["recipes/quickstart.yaml", "conf/gate/none.yaml", "conf/stage/sft.yaml"])
def test_a_file_that_another_of_its_name_would_hide_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    for name in (file, "recipes/fine.yaml", "conf/gate/fine.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    bad = entry("bad", monkeypatch, register_config=bringing_files(tmp_path))
    host = plugins.load([bad])
    assert host.plugins["bad"].reason.startswith(f"{tmp_path / file}: the ")
    assert "bad" not in host.folders
    (tmp_path / file).unlink()
    again = entry("again", monkeypatch, register_config=bringing_files(tmp_path))
    host = plugins.load([bad, again])
    assert host.options["recipes/fine"] == tmp_path / "recipes/fine.yaml"
    assert [info.state for info in host.plugins.values()][-2:] == ["loaded", "failed"]  # again, bad: by their names


def test_a_folder_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = plugins.load([entry("bad", monkeypatch, register_config=bringing_files(tmp_path / "absent"))])
    assert host.plugins["bad"].reason == f"register_config names {tmp_path / 'absent'}, which is no folder"


# --- Which plugins are wanted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "states"),
    [
        ("", {"mine": "loaded", "preference": "loaded"}),
        ("mine", {"mine": "loaded", "preference": "blocked"}),
        ("mine==1.0, preference", {"mine": "loaded", "preference": "loaded"}),
        ("mine==1.1", {"mine": "failed", "preference": "blocked"}),
        ("mine,absent", {"mine": "loaded", "absent": "failed"}),
    ],
)
def test_plugins_are_chosen_and_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, states: dict[str, str]
) -> None:
    install(tmp_path / "site", monkeypatch, "mine", {"mine_plugin.py": ""})
    monkeypatch.setenv("POSTTRAIN_PLUGINS", wanted)
    found = plugins.load().plugins
    assert {name: found[name].state for name in states} == states
    for name, state in states.items():
        assert state == "loaded" or "POSTTRAIN_PLUGINS" in found[name].reason
    assert found["sft.plugin"].state == "loaded"


@pytest.mark.parametrize("value", ["0", "-1", "soon", "true"])
def test_a_bad_timeout_is_refused(host: Host, value: str) -> None:
    with pytest.raises(BadInput, match=r"plugin_timeout: .* is not a number of seconds"):
        make_plan(compose(host, ["recipe=quickstart", f"plugin_timeout={value}"]), host)


@pytest.mark.parametrize("value", ["0", "nan", "soon", ""])
def test_a_bad_time_for_loading_is_refused(value: str) -> None:
    result = command("list", "plugins", POSTTRAIN_START_SECONDS=value)
    assert result.returncode == 2
    assert result.stderr == f"error: POSTTRAIN_START_SECONDS: {value!r} is not a number of seconds above 0\n"
