from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import environment
from posttrain.cli import COMMANDS
from posttrain.host import plugins
from tests.support.command import call, complete, main
from tests.support.fakes import GATES, Script, run_recipe, write_project


@pytest.mark.parametrize("words", [["--help"], [], ["help"], ["doctor", "--help"], ["--version"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*words) == 0
    assert "posttrain" in capsys.readouterr().out


WEB = ("fastapi", "uvicorn", "starlette", "httpx")


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (
            ["--help"],
            ("hydra", "omegaconf", "yaml", "torch", "rich", "numpy", "pluggy", "importlib.metadata", *WEB),
        ),
        (
            ["list"],
            (
                "posttrain.data.records",
                "hydra",
                "omegaconf",
                "yaml",
                "torch",
                "rich",
                "numpy",
                "transformers",
                "trl",
                *WEB,
            ),
        ),
        (["plan", "recipe=quickstart"], ("torch", "transformers", "trl", "lm_eval", "datasets", *WEB)),
    ],
)
def test_light_commands_import_nothing_heavy(words: list[str], forbidden: tuple[str, ...]) -> None:
    code = f"import sys\nfrom posttrain.cli import dispatch\ndispatch({words!r})\nprint('LOADED', *sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = result.stdout.rpartition("LOADED")[2].split()
    assert not set(forbidden) & set(loaded)


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("list") == 0
    text = capsys.readouterr().out
    for name in ("quickstart", "llama8b_sft_dpo", "sft", "dpo", "lora", "preference"):
        assert name in text


def test_list_as_json_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("list", "stages", "--json") == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {"sft", "dpo"} <= {stage["name"] for stage in stages}


def test_list_shows_the_settings_of_a_stage_with_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("list", "sft", "--json") == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert all(setting["help"] for setting in settings)
    assert {"lr", "lora.r", "gate.confidence"} <= {setting["name"] for setting in settings}


def test_every_setting_of_every_stage_and_node_has_help() -> None:
    from posttrain.commands.list import NODES
    from posttrain.config.help import docstrings

    for each in [*plugins.load().stages.values(), *NODES.values()]:
        assert all(docstrings(each.config).values()), each.name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model"], "model.chat_template: str | None = null"),
        (["source"], "STAGE.data.columns:"),
        (["lora"], "STAGE.lora.r: int = 32"),
        (["gate"], "STAGE.gate.on_fail: OnFail = stop"),
        (["task"], "STAGE.gate.tasks.TASK.max_drop:"),
        (["gate", "dpo_default"], "lift   preferences"),
        (["tasks", "gsm8k"], "gsm8k_cot"),
        (["tasks", "safety_*"], "safety_harmful"),
    ],
)
def test_list_shows_nodes_gates_and_tasks(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("list", *words) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plann"], "Did you mean plan?"),
        (["foo"], "Commands: card, "),
        (["ledger"], "needs one of export, rebuild, verify"),
        (["ledger", "verify", "--format", "csv"], "'--format' is no flag of this command"),
        (["list", "stagse"], "Did you mean stages?"),
        (["list", "gate", "dpo_defalt"], "Did you mean dpo_default?"),
        (["list", "tasks", "no_such_task"], "tasks has such a name"),
        (["recipe=quickstrat"], "Did you mean quickstart?"),
        (["report", "nowhere"], "is not the directory of a run"),
        (["report"], "holds no run"),
        (["sample", "nowhere", "questions.jsonl", "pairs.jsonl"], "nowhere: there is no such directory"),
        (["card", "nowhere"], "nowhere: there is no such directory"),
        (["export", "nowhere", "--to", "merged"], "nowhere: there is no such directory"),
        (["push", "nowhere", "me/mine"], "nowhere: there is no such directory"),
        (["merge", "nowhere", "merged"], "nowhere: there is no such directory"),
        (["gate", "adapter=nowhere", "gate=quickstart"], "nowhere: there is no such directory"),
        (["chat", "nowhere"], "An artifact is a folder such as runs/RUN/stages/STAGE/artifact"),
        (["plan"], "Add recipe=NAME"),
        (["sft.lr=1"], "Add recipe=NAME"),
        (["--multirun", "recipe=quickstrat"], "quickstrat"),
    ],
)
def test_bad_words_end_with_code_2_and_no_traceback(
    words: list[str], expected: str, capfd: pytest.CaptureFixture[str], working_folder: Path
) -> None:
    assert main(*words) == 2
    captured = capfd.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not list(working_folder.iterdir())


def test_plan_as_json_is_json_alone() -> None:
    result = call("plan", "recipe=llama8b_sft_dpo", "--json")
    plan = json.loads(result.stdout)
    assert [stage["kind"] for stage in plan["stages"]] == ["sft", "dpo"]
    assert plan["config"]["dpo"]["beta"] == 0.1


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = f"{sys.executable} -m posttrain list --json | head -c 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert not result.stderr


def test_report_prints_the_table_of_the_newest_run(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(working_folder)
    directory = run_recipe(Script())
    capsys.readouterr()
    assert main("report") == 0
    newest = capsys.readouterr().out
    assert main("report", directory.path.name) == 0
    assert capsys.readouterr().out == newest
    for text in ("mine: done", "sft", "dpo", "+50.0 [+40.0, +60.0] vs base", "pass"):
        assert text in newest


def test_exit_codes_of_a_run(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.fakes import scripted_host

    write_project(working_folder)
    for verdict, code in (("pass", 0), ("fail", 3), ("undecided", 4)):
        script = Script()
        script.verdicts["sft"] = verdict  # type: ignore[assignment]
        host = scripted_host(script)
        monkeypatch.setattr("posttrain.host.plugins.load", lambda host=host: host)
        assert main("recipe=mine", f"output_root={verdict}", *GATES) == code


def test_multirun_runs_every_combination(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.support.fakes import scripted_host

    write_project(working_folder)
    script = Script()
    host = scripted_host(script)
    monkeypatch.setattr("posttrain.host.plugins.load", lambda: host)
    assert main("recipe=mine", "--multirun", "sft.lr=1e-5,2e-5", *(f"{gate}" for gate in GATES)) == 0
    assert script.trained == ["sft", "dpo"] * 2
    runs = [json.loads(path.read_text()) for path in Path("runs").glob("mine-*/run.json")]
    assert sorted(run["command"][:3] for run in runs) == [
        ["posttrain", "recipe=mine", "sft.lr=1e-05"],
        ["posttrain", "recipe=mine", "sft.lr=2e-05"],
    ]
    assert sorted(path.name for path in working_folder.iterdir() if path.is_dir()) == ["base", "recipes", "runs"]
    table = capsys.readouterr().out.rpartition("differs in")[2]  # of all its runs, at the end
    assert {"sft.lr=1e-05", "sft.lr=2e-05"} <= set(table.split())


def test_completion_of_commands_recipes_and_keys() -> None:
    assert complete("posttrain pl") == ["plan"]
    assert "recipe=quickstart" in complete("posttrain recipe=quick")
    assert "recipe=quickstart" in complete("posttrain plan recipe=quick")
    assert complete("posttrain gate gate=quickstart gate.tasks.towns_facts.min") == ["gate.tasks.towns_facts.min_lift="]
    assert complete("posttrain recipe=quickstart sft.lor") == ["sft.lora."]
    assert complete("posttrain list gate dpo") == ["dpo_default"]
    assert complete("posttrain recipe=quickstart gate@sft.gate=dpo") == ["gate@sft.gate=dpo_default"]
    offered = ["sft.gate.on_fail=rollback", "sft.gate.on_fail=stop", "sft.gate.on_fail=warn"]
    assert complete("posttrain plan recipe=quickstart sft.gate.on_fail=") == offered
    assert complete("posttrain +stage@x=dp") == ["+stage@x=dpo"]
    assert {"gates", "tasks", "model", "sft"} <= set(complete("posttrain list "))
    assert not [word for word in complete("posttrain list ") if "=" in word]
    assert "posttrain" in call("-sc", "install=bash").stdout


def test_libraries_are_imported_without_a_compiler_and_other_peoples_modules_with_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(environment.NO_COMPILER)
    for given in (None, "0"):
        if given is not None:
            monkeypatch.setenv(environment.NO_COMPILER, given)
        with environment.importing():
            assert os.environ[environment.NO_COMPILER] == "1"
        with environment.importing(others=True):
            assert os.environ.get(environment.NO_COMPILER) == given
        assert os.environ.get(environment.NO_COMPILER) == given


def test_no_garbage_is_looked_for_while_libraries_are_imported() -> None:
    assert gc.isenabled()
    with environment.importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), environment.importing():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with environment.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_no_command_takes_an_empty_word(command: str, working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for empty in ("", " "):
        assert main(*([command] if command else []), empty) == 2
        assert f"posttrain{f' {command}' if command else ''}: the word behind it is empty" in capsys.readouterr().err
        assert main(*([command] if command else []), "recipe=mine", "--format", empty) == 2
        assert "posttrain" in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "words", ["runs output_root=", "leaderboard task=", "merge model.path=", "push public=", "card license="]
)
def test_no_setting_of_a_command_is_empty(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*words.split()) == 2
    key = words.split()[1]
    assert f"{words}: is empty\n    Give {key}VALUE, or leave it out" in capsys.readouterr().err
