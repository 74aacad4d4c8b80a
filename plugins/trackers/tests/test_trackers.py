from __future__ import annotations

import random
import sys
import threading
import tomllib
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import posttrain_trackers
import pytest
from posttrain_trackers import TRACKERS
from posttrain_trackers.services import WandbSettings

from posttrain import cli
from posttrain.config.compose import compose
from posttrain.errors import BadInput
from posttrain.host.plugins import Host
from posttrain.plan import make_plan
from tests.support.command import complete
from tests.support.fakes import GATES, Script, run_json, run_on, run_recipe, scripted_host, write_project

ROOT = Path(__file__).resolve().parents[3]


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
    step = next(logged for logged in run.logged if "sft/loss" in logged)
    assert step.pop("sft/tokens_per_second") > 0
    assert step == {"sft/loss": 1.0, "sft/tokens": 10.0}
    assert {"sft/lift/some/base": 0.5} in run.logged
    assert run.summary["dpo/verdict"] == "pass"
    assert run.exit_code == 0


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_service_that_fails_never_fails_the_run(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **settings: Any) -> Any:
        raise ConnectionError("unreachable")

    run = FakeRun()
    service(monkeypatch, fail if broken == "init" else lambda **settings: run)
    if broken != "init":
        monkeypatch.setattr(run, broken, fail)
    run_recipe(Script(), "tracker=wandb")
    assert run_json()["state"] == "done"
    assert capsys.readouterr().err.count("wandb is off for the rest of this run: ConnectionError: unreachable") == 1


def test_a_service_that_hangs_holds_a_run_up_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forever = threading.Event()
    monkeypatch.setattr("posttrain_trackers.tracking.CALL_SECONDS", 0.01)
    run = FakeRun()
    monkeypatch.setattr(run, "log", lambda values: forever.wait())
    service(monkeypatch, lambda **settings: run)
    run_recipe(Script(), "tracker=wandb")
    forever.set()
    assert run_json()["state"] == "done"
    assert capsys.readouterr().err.count("wandb is off for the rest of this run: TimeoutError: no answer in") == 1


def test_what_a_client_prints_is_no_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRun()
    monkeypatch.setattr(run, "log", lambda values: print("an advertisement"))
    service(monkeypatch, lambda **settings: run)
    run_recipe(Script(), "tracker=wandb")
    shown = capsys.readouterr()
    assert "an advertisement" not in shown.out + shown.err
    assert "done" in shown.out


@pytest.mark.parametrize(
    ("words", "variable", "mode"),
    [([], None, "offline"), (["tracker.online=true"], None, "online"), (["tracker.online=true"], "offline", "offline")],
)
def test_a_run_is_sent_only_when_asked_for(
    words: list[str], variable: str | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    asked: list[str] = []

    def init(**settings: Any) -> FakeRun:
        asked.append(settings["mode"])
        return FakeRun()

    service(monkeypatch, init)
    run_recipe(Script(), "tracker=wandb", *words)
    assert asked == [mode]


def test_nothing_is_tracked_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**settings: Any) -> Any:
        raise AssertionError("asked")

    service(monkeypatch, fail)
    run_recipe(Script())
    assert run_json()["state"] == "done"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_client_that_is_not_installed_is_a_problem_of_the_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain_trackers.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=rf"not installed\n.*pip install 'posttrain\[{name}\]'"):
        run_recipe(Script(), f"tracker={name}")


def test_every_tracker_has_its_option_and_its_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = tomllib.loads((ROOT / "plugins/trackers/pyproject.toml").read_text(encoding="utf-8"))["project"]
    options = {path.stem for path in Path(posttrain_trackers.__file__).parent.glob("conf/tracker/*.yaml")}
    extras = own["optional-dependencies"]
    assert options == set(TRACKERS) == set(extras)
    assert {name: project["optional-dependencies"][name] for name in extras} == extras


def test_each_run_of_a_sweep_is_tracked_by_its_own_tracker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        runs.append(FakeRun())
        return runs[-1]

    service(monkeypatch, init)
    host = scripted_host(Script())
    for seed in (1, 2):
        run_on(host, "tracker=wandb", f"seed={seed}")
    assert [run.exit_code for run in runs] == [0, 0]
    assert [len(run.logged) for run in runs] == [4, 4]
    assert "wandb is off" not in capsys.readouterr().err


def test_a_client_that_draws_random_numbers_changes_none_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()

    def init(**settings: Any) -> FakeRun:
        random.seed(1)
        return run

    service(monkeypatch, init)
    numbers = random.getstate()
    run_recipe(Script(), "tracker=wandb")
    assert random.getstate() == numbers
    assert run.exit_code == 0


def test_its_settings_are_listed_typed_and_checked(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    cli.dispatch(["list", "wandb"])
    assert "tracker.project: str = posttrain" in capsys.readouterr().out
    words = ["recipe=mine", *GATES]
    plan = make_plan(compose(host, [*words, "tracker=wandb", "tracker.entity=us"]), host)
    assert (plan.tracker, plan.settings["wandb"]) == ("wandb", WandbSettings(entity="us"))
    assert plan.shaping == ()
    with pytest.raises(BadInput) as caught:
        make_plan(compose(host, [*words, "tracker=wandb", "tracker.projekt=p", "tracker.entity=[1]"]), host)
    assert [problem.where for problem in caught.value.problems] == ["tracker.projekt=p", "tracker.entity=[1]"]
    assert "Did you mean tracker.project?" in str(caught.value)
    with pytest.raises(
        BadInput,
        match=r"no tracker is chosen\n    Add tracker=NAME. Available: comet, mlflow, tensorboard, trackio, wandb",
    ):
        make_plan(compose(host, [*words, "tracker.project=p"]), host)
    with pytest.raises(BadInput, match=r"no tracker named 'wandbb'\n    Did you mean wandb\?"):
        make_plan(compose(host, [*words, "tracker=wandbb"]), host)


def test_a_recipe_sets_a_tracker_and_the_command_line_switches_it_off(host: Host, working_folder: Path) -> None:
    path = working_folder / "recipes" / "mine.yaml"
    text = path.read_text().replace("  - _self_", "  - override /tracker: wandb\n  - _self_")
    path.write_text(f"{text}tracker: {{project: ours}}\n")
    words = ["recipe=mine", *GATES]
    assert make_plan(compose(host, words), host).settings["wandb"].project == "ours"
    plan = make_plan(compose(host, [*words, "tracker=none"]), host)
    assert (plan.tracker, plan.settings) == ("none", {})


def test_an_option_of_the_users_own_takes_a_trackers_settings(host: Host, working_folder: Path) -> None:
    (working_folder / "tracker").mkdir()
    own = working_folder / "tracker" / "ours.yaml"
    words = ["recipe=mine", *GATES, "--config-dir", str(working_folder), "tracker=ours"]
    own.write_text("defaults:\n  - /settings@_here_: wandb\nproject: ours\n")
    plan = make_plan(compose(host, words), host)
    assert (plan.tracker, plan.settings["wandb"].project) == ("wandb", "ours")
    own.write_text("project: ours\n")
    with pytest.raises(BadInput, match="the option 'ours' has no tracker's settings"):
        make_plan(compose(host, words), host)


def test_the_options_of_the_group_are_completed() -> None:
    assert complete("posttrain recipe=mine tracker=wa") == ["tracker=wandb"]
    assert complete("posttrain recipe=mine tracker=wandb tracker.p") == ["tracker.project="]
