"""Whatever a plugin does wrong, in whichever hook: it is named, the exit code is 6, and nothing else is affected."""

from __future__ import annotations

import inspect
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from posttrain import hookspecs
from posttrain.artifact import verify
from posttrain.errors import Diverged, PluginFailed, PosttrainError
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.testing import Project
from tests.support.command import PROGRAM
from tests.support.fakes import Script, only_run, run_json, run_recipe, states, write_project
from tests.support.installed import command, install, listed
from tests.support.warm import started

HOOKS = {
    "register_stages": "", "register_settings": "", "register_rewards": "", "register_config": "",
    "register_filters": "", "register_readers": "", "register_eval_tasks": "",
    "check_plan": "plan", "run_started": "plan, directory", "check_gate": "step", "load_records": "step",
    "run_stage": "stage, context", "step_logged": "stage, step, metrics", "evaluate_artifact": "request, progress",
    "judge_artifact": "request, scorecard", "stage_finished": "stage, artifact, verdict",
    "run_finished": "directory, state",
}  # fmt: skip
START = (
    "register_stages", "register_settings", "register_rewards", "register_filters", "register_config",
    "register_eval_tasks", "register_readers",
)  # fmt: skip
LATER = [hook for hook in HOOKS if hook not in START]
PROTESTS = {
    # what a plugin does, and what is said about it
    "raises": ("raise RuntimeError('out of order')", "RuntimeError: out of order"),
    "exits": ("sys.exit(0)", "SystemExit: 0"),
    "wrong": ("return object()", "it answered <object object at"),
    "moves": ("os.chdir('/')", "it changed the working directory, to /"),
    "seeds": ("random.seed(0)", "it changed the random numbers of random"),
}
CRASHES = {
    "vanishes": ("os._exit(0)", "ended the process with exit code 0"),
    "segfaults": ("ctypes.string_at(0)", "took the process down: SIGSEGV"),
    "hangs": ("time.sleep(600)", "hung and had to be ended"),
    "locks up": ("ctypes.PyDLL(None).sleep(600)", "hung and had to be ended"),  # holds the interpreter's lock
}
PATIENCE = 600
"""Seconds that a loaded machine may take."""
PLUGIN = """\
import ctypes, os, random, sys, time
from posttrain import hookimpl

@hookimpl(tryfirst=True)
def {hook}({arguments}):
    {action}
"""
CALLER = """\
import inspect, os, sys
from pathlib import Path
from posttrain import hookspecs
from posttrain.host import activity
from posttrain.host import plugins
from posttrain.errors import PosttrainError, explain
from posttrain.host.supervisor import supervise

def work():
    arguments = dict.fromkeys(inspect.signature(getattr(hookspecs, hook)).parameters)
    try:
        with activity.running(Path("run"), silence_limit=float(sys.argv[1])):
            getattr(host.hook, hook)(**arguments)
    except PosttrainError as error:
        return explain(error)
    return 0

host = plugins.load()
children = {}
for hook in sys.argv[2:]:
    children[hook] = os.fork()
    if not children[hook]:
        os.dup2(os.open(f"{hook}.err", os.O_WRONLY | os.O_CREAT), 2)
        sys.exit(supervise(work))
for hook, child in children.items():
    print(hook, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
LIST = [*PROGRAM, "list", "plugins", "--json"]
Lists = Callable[[str], Mapping[str, dict[str, dict[str, str]]]]
Ends = Callable[[str], Mapping[str, tuple[int, str]]]


def faulty(folder: Path, monkeypatch: pytest.MonkeyPatch, hook: str, action: str) -> None:
    """Install the plugin ``bad`` whose only hook does something wrong, and the plugin ``good``."""
    text = PLUGIN.format(hook=hook, arguments=HOOKS[hook], action=action)
    install(folder / "site", monkeypatch, "bad", {f"bad_{abs(hash((str(folder), hook)))}.py": text})
    install(folder / "site", monkeypatch, "good", {"good_plugin.py": "POSTTRAIN_API = 1\n"})


def seconds_for(fault: str) -> str:
    """What every plugin may take to load: short where one hangs, but enough for the others on a busy machine."""
    return "5" if fault in ("hangs", "locks up") else str(PATIENCE)


def call(host: Host, hook: str, arguments: Mapping[str, None]) -> None:
    """Call a hook of the plugin ``bad`` alone."""
    others = [plugin for name, plugin in host.manager.list_name_plugin() if name != "bad"]
    host.manager.subset_hook_caller(hook, others)(**arguments)


def test_every_hook_is_among_them() -> None:
    declared = {name: item for name, item in vars(hookspecs).items() if hasattr(item, "posttrain_spec")}
    assert {name: ", ".join(inspect.signature(item).parameters) for name, item in declared.items()} == HOOKS


# --- While plugins are loaded -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Lists:
    """The list of plugins for every hook in which ``bad`` has a fault while it is loaded; all wait at the same time."""

    @cache
    def of(fault: str) -> Mapping[str, dict[str, dict[str, str]]]:
        action, _ = {**PROTESTS, **CRASHES}[fault]
        with ExitStack() as stack:
            processes = {}
            for hook in START:
                with pytest.MonkeyPatch.context() as patch:
                    faulty(tmp_path_factory.mktemp("lists"), patch, hook, action)
                    environment = {**os.environ, "POSTTRAIN_START_SECONDS": seconds_for(fault)}
                processes[hook] = stack.enter_context(started(LIST, stdout=subprocess.PIPE, env=environment))
            told = {hook: process.communicate(timeout=PATIENCE)[0] for hook, process in processes.items()}
        return {hook: {row["name"]: row for row in json.loads(text)["plugins"]} for hook, text in told.items()}

    return of


@pytest.mark.parametrize("hook", START)
@pytest.mark.parametrize("fault", [*PROTESTS, *CRASHES])
def test_a_plugin_that_fails_to_register_is_left_out_and_named(lists: Lists, hook: str, fault: str) -> None:
    found = lists(fault)[hook]
    _, says = {**PROTESTS, **CRASHES}[fault]
    assert found["bad"]["state"] == "failed"
    assert says in found["bad"]["summary"]
    assert found["bad"]["origin"] == "bad-plugin 1.0"
    assert {found[name]["state"] for name in ("good", "preference", "sft.plugin")} == {"loaded"}


@pytest.mark.parametrize("fault", ["raises", "exits", "moves", *CRASHES])
def test_a_plugin_that_fails_to_import_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    action, says = {**PROTESTS, **CRASHES}[fault]
    text = f"import ctypes, os, random, sys, time\n{action}\n"
    install(tmp_path / "site", monkeypatch, "bad", {"bad_import.py": text})
    found = listed(POSTTRAIN_START_SECONDS=seconds_for(fault))
    assert (found["bad"]["state"], found["preference"]["state"]) == ("failed", "loaded")
    assert says.removeprefix("it ") in found["bad"]["summary"]


def test_two_plugins_that_end_the_process_are_both_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bad", "worse"):
        install(tmp_path / "site", monkeypatch, name, {f"{name}_one.py": "import os\nos._exit(7)\n"})
    found = listed()
    assert [found[name]["state"] for name in ("bad", "worse", "preference")] == ["failed", "failed", "loaded"]


def test_a_stage_that_is_called_as_a_list_is_hides_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = STAGE.format(action="").replace('name="bad"', 'name="plugins"')
    install(tmp_path / "site", monkeypatch, "odd", {"odd_plugin.py": text})
    assert listed()["odd"]["stages"] == ["plugins"]


def test_recipes_that_need_it_not_are_planned_and_the_one_that_does_ends_with_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(tmp_path, monkeypatch, "register_stages", "os._exit(3)")
    assert command("plan", "recipe=quickstart").returncode == 0
    result = command("plan", "recipe=quickstart", "+stage@bad=bad")
    assert result.returncode == 6
    assert "no stage is named 'bad': plugin bad (bad-plugin 1.0) failed to load" in result.stderr
    assert "ended the process with exit code 3 in register_stages" in result.stderr


# --- In every later hook ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    """The exit code and the message of every later hook's process when the plugin ``bad`` has a fault in each of them.

    One launch calls all of them, each in a process of its own.
    """

    @cache
    def end(fault: str) -> Mapping[str, tuple[int, str]]:
        folder = tmp_path_factory.mktemp("ends")
        hooks = "".join(
            f"\n@hookimpl(tryfirst=True)\ndef {hook}({HOOKS[hook]}):\n    {CRASHES[fault][0]}\n" for hook in LATER
        )
        text = f"import ctypes, os, time\nfrom posttrain import hookimpl\n{hooks}"
        limit = "0.3" if fault == "hangs" else str(PATIENCE)
        with pytest.MonkeyPatch.context() as patch:
            install(folder / "site", patch, "bad", {"bad_in_every_hook.py": text})
            result = subprocess.run(
                [sys.executable, "-c", CALLER, limit, *LATER], cwd=folder, capture_output=True, text=True, check=False
            )
        assert result.returncode == 0, result.stderr
        codes = dict(line.split() for line in result.stdout.splitlines())
        return {hook: (int(code), (folder / f"{hook}.err").read_text()) for hook, code in codes.items()}

    return end


@pytest.mark.parametrize("fault", ["vanishes", "segfaults", "hangs"])
@pytest.mark.parametrize("hook", LATER)
def test_a_plugin_that_ends_the_process_is_named(ends: Ends, hook: str, fault: str) -> None:
    code, said = ends(fault)[hook]
    assert code == 6, said
    assert f"error: plugin bad (bad-plugin 1.0) in {hook}: it {CRASHES[fault][1]}" in said


@pytest.mark.parametrize("hook", LATER)
@pytest.mark.parametrize("fault", PROTESTS)
def test_a_plugin_that_misbehaves_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str, fault: str
) -> None:
    action, says = PROTESTS[fault]
    faulty(tmp_path, monkeypatch, hook, action)
    host, numbers = plugins.load(), random.getstate()
    arguments = dict.fromkeys(word for word in HOOKS[hook].split(", ") if word)
    if (hook, fault) == ("run_stage", "seeds"):
        call(host, hook, arguments)  # a plugin that trains may seed
    else:
        with pytest.raises(PluginFailed) as caught:
            call(host, hook, arguments)
        assert f"plugin bad (bad-plugin 1.0) in {hook}: {says}" in str(caught.value)
    assert Path.cwd() == tmp_path
    assert random.getstate() == numbers


LEAVES = {
    "torch.set_default_dtype(torch.float64)": "the default number format of torch; it has to put back what it finds",
    "torch.set_grad_enabled(False)": "whether torch records gradients; it has to put back what it finds",
    "torch.manual_seed(0)": "the random numbers of torch; it has to use a generator of its own",
}


@pytest.mark.parametrize("action", LEAVES)
@pytest.mark.parametrize("hook", ["load_records", "run_stage"])
def test_what_a_plugin_sets_in_torch_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str, action: str
) -> None:
    import torch

    faulty(tmp_path, monkeypatch, hook, f"import torch; {action}")
    host, numbers = plugins.load(), torch.get_rng_state()
    arguments = dict.fromkeys(HOOKS[hook].split(", "))
    if hook == "run_stage":
        call(host, hook, arguments)
    else:
        with pytest.raises(PluginFailed, match=f"it changed {LEAVES[action]}"):
            call(host, hook, arguments)
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("hook", LATER)
def test_a_run_that_a_plugin_ends_keeps_its_artifacts_and_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    faulty(tmp_path, monkeypatch, hook, PROTESTS["raises"][0])
    write_project(tmp_path)
    with pytest.raises(PluginFailed, match=rf"plugin bad \(bad-plugin 1\.0\) in {hook}: RuntimeError"):
        run_recipe(Script())
    for manifest in tmp_path.rglob("runs/*/stages/*/artifact/manifest.json"):
        verify(manifest.parent)
    if hook not in ("check_plan", "run_finished"):
        assert run_json()["state"] == "failed"
        monkeypatch.setenv("POSTTRAIN_BLOCK_PLUGINS", "bad")
        run_recipe(Script())
        assert run_json()["state"] == "done"


def test_the_others_hear_of_the_end_of_a_run_and_its_own_error_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listening:
        states: Sequence[str] = ()

        @hookimpl(trylast=True)
        def run_finished(self, state: str) -> None:
            self.states = [*self.states, state]

    faulty(tmp_path, monkeypatch, "run_finished", "raise RuntimeError('out of order')")
    write_project(tmp_path)
    script, others = Script(), Listening()
    script.verdicts["dpo"] = "fail"
    with pytest.raises(PosttrainError, match="dpo is a fail"):
        run_recipe(script, others=[others])
    assert others.states == ["gate_failed"]


def test_a_wrapper_is_guarded_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(tmp_path)
    wrapper = "import os\nfrom posttrain import hookimpl\n@hookimpl(wrapper=True)\ndef run_stage():\n    {}\n"
    for number, (body, says) in enumerate(
        {
            "raise RuntimeError('before'); yield": "RuntimeError: before",
            "yield; raise RuntimeError('after')": "RuntimeError: after",
            "yield; os.chdir('/')": "it changed the working directory",
            "return (yield) and 3": "run_stage returned 3",
            "yield; yield": "it yields twice",
            "if False: yield": "does not yield",
        }.items()
    ):
        with monkeypatch.context() as patch:
            install(tmp_path / f"site{number}", patch, "bad", {f"bad_wrapper{number}.py": wrapper.format(body)})
            with pytest.raises(PluginFailed) as caught:
                run_recipe(Script())
        assert says in str(caught.value)


def test_a_wrapper_that_passes_everything_on_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_project(tmp_path)
    text = "from posttrain import hookimpl\n@hookimpl(wrapper=True)\ndef run_stage():\n    return (yield)\n"
    install(tmp_path / "site", monkeypatch, "fine", {"fine_wrapper.py": text})
    run_recipe(Script())
    assert verify(only_run() / "stages/sft/artifact").manifest.plugins == ("fine (fine-plugin 1.0)",)
    script = Script()
    script.during_training = lambda context: (_ for _ in ()).throw(KeyError("the stage's own"))
    with pytest.raises(KeyError, match="own"):
        run_recipe(script, "seed=1")


# --- In the stage itself ----------------------------------------------------------------------------------------------

STAGE = """\
import ctypes, os, sys, time

from posttrain import Stage, StageConfig, hookimpl

@hookimpl
def register_stages():
    return [Stage(name="bad", summary="", config=StageConfig, run=__name__ + ":run", parent="sft", records="documents")]

def run(context):
    import torch
    context.progress.start(1)
    model = context.policy()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data += 0.1
    context.progress.step(1, {{"loss": 1.0}})
    {action}
    context.save(model)
"""
STAGE_FAULTS = {
    "raises": ("raise RuntimeError('out of order')", "failed: RuntimeError: out of order"),
    "misses a file": ("open('absent')", "failed: FileNotFoundError"),
    "exits": ("sys.exit(0)", "failed: SystemExit: 0"),
    "saves nothing": ("return", "ended without context.save"),
    "saves NaN": ("trained[0].data.fill_(float('nan'))", "saved an unsound"),
    "saves what it was given": ("model = context.policy()", "saved an unsound"),
    "moves": ("os.chdir('/')", "changed the working directory to /"),
    "leaves a pickle": (
        "context.save(model); (context.output / 'a.pkl').write_bytes(b'')",
        "saved an unsound",
    ),
    "measures nonsense": ("context.metrics['loss'] = object()", "failed: TypeError"),
    "measures NaN": ("context.metrics['loss'] = float('nan')", "failed: ValueError"),
    "moves on": ("context.output.rename(context.output.with_name('elsewhere'))", "failed: "),
}


def bad_stage(folder: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> Project:
    module = f"bad_stage_{abs(hash(str(folder)))}.py"
    install(folder / "site", monkeypatch, "bad", {module: STAGE.format(action=action)})
    (folder / "project").mkdir()
    return Project(folder=folder / "project", kind="bad", settings={}).write()


@pytest.mark.parametrize("fault", STAGE_FAULTS)
def test_a_stage_that_misbehaves_is_named_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    action, says = STAGE_FAULTS[fault]
    project = bad_stage(tmp_path, monkeypatch, action)
    with pytest.raises(PluginFailed) as caught:
        project.run(tmp_path / "runs")
    assert says in str(caught.value)
    assert "'bad'" in str(caught.value)
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.rglob("runs/*/stages/bad/artifact"))
    verify(project.folder / "sft")


def test_a_stage_that_diverges_publishes_nothing_and_is_not_called_a_fault_of_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = bad_stage(tmp_path, monkeypatch, "context.progress.step(2, {'loss': float('nan')})")
    with pytest.raises(Diverged, match="diverged at step 2: the loss of bad is nan"):
        project.run(tmp_path / "runs")
    assert not list(tmp_path.rglob("runs/*/stages/bad/artifact"))


@pytest.mark.parametrize(
    ("action", "limit", "says"),
    [
        ("os._exit(0)", PATIENCE, "ended the process with exit code 0"),
        ("os.kill(os.getpid(), 9)", PATIENCE, "down: SIGKILL. The system does this when memory runs out"),
        ("time.sleep(600)", 10, "hung and had to be ended after 10 s"),  # 10 s, as it imports torch before
    ],
)
def test_a_stage_that_ends_the_process_is_named_and_its_parent_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, limit: int, says: str
) -> None:
    project = bad_stage(tmp_path, monkeypatch, action)
    with project.recipes_found():
        result = command(*project.words(), f"plugin_timeout={limit}")
    assert result.returncode == 6
    assert "error: plugin bad (bad-plugin 1.0) in stage 'bad': it " in result.stderr
    assert says in result.stderr
    assert not list(tmp_path.rglob("runs/*/stages/bad/artifact"))
    verify(project.folder / "sft")
    assert (run_json()["state"], states()) == ("failed", {"bad": "failed"})
    result = command("report")
    assert result.returncode == 0, result.stderr
    assert "conformance: failed" in result.stdout
