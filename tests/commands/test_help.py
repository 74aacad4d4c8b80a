"""Help of every command; a first recipe from a file of chats; the list of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.config.compose import compose
from posttrain.config.paths import shipped
from posttrain.host.plugins import Host
from posttrain.plan import make_plan
from tests.support.command import main
from tests.support.fakes import Script, run_recipe, write_project

BASE = str(shipped("recipes") / "quickstart/base")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert main(command, flag) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"posttrain {command}")
        assert "\nExample: posttrain " in text
        assert max(map(len, text.splitlines())) <= 120


def test_help_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("recipe=quickstart", "--help") == 0
    assert "--multirun" in capsys.readouterr().out
    assert main("nonsense", "--help") == 2
    capsys.readouterr()
    assert main("recipe=quickstart", "--dry-run") == 0
    planned = capsys.readouterr().out
    assert main("plan", "recipe=quickstart") == 0
    assert capsys.readouterr().out == planned


def write_rows(path: str, rows: list[dict[str, object]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(number: int) -> dict[str, object]:
    turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
    return {"messages": turns}


def test_a_file_of_chats_becomes_a_recipe_that_plans(
    working_folder: Path, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows("my chats.jsonl", [*map(chat, range(200)), *map(chat, range(20))])
    assert main("init", "my chats.jsonl", "--model", BASE) == 0
    assert "posttrain recipe=my_chats" in capsys.readouterr().out
    text = Path("recipes/my_chats.yaml").read_text()
    (step,) = make_plan(compose(host, ["recipe=my_chats"]), host).steps
    assert list(step.tasks) == ["responses"]
    sides = [Path(f"recipes/my_chats/{name}.jsonl").read_text().splitlines() for name in ("train", "test")]
    assert len(sides[0]) + len(sides[1]) == 220
    assert 20 <= len(sides[1]) <= 33
    assert not {*sides[0]} & {*sides[1]}  # a question asked twice stays on one side
    assert main("init", "my chats.jsonl", "--model", BASE) == 0
    assert Path("recipes/my_chats.yaml").read_text() == text
    assert make_plan(compose(host, ["recipe=my_chats_2"]), host).steps


def test_pairs_questions_other_keys_and_few_rows(working_folder: Path, host: Host) -> None:
    write_rows("chats.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(100)])
    write_rows("pairs.jsonl", [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(100)])
    write_rows("questions.jsonl", [{"question": "6 * 7?", "answer": 42}])
    write_rows("few.jsonl", [chat(n) for n in range(5)])
    words = ["--model", BASE, "--pairs", "pairs.jsonl", "--questions", "questions.jsonl", "--name", "both"]
    assert main("init", "chats.jsonl", *words) == 0
    sft, dpo = make_plan(compose(host, ["recipe=both"]), host).steps
    assert sft.sources[0].columns == {"prompt": "question", "completion": "answer"}
    assert (list(sft.tasks), list(dpo.tasks)) == (["mine"], ["preferences"])
    assert main("init", "few.jsonl", "--model", BASE) == 0
    assert not make_plan(compose(host, ["recipe=few"]), host).steps[0].gate.enabled


def test_rows_are_no_longer_than_the_model_in_the_folder_was_made_for(working_folder: Path) -> None:
    long = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "word " * 600}]}
    write_rows("long.jsonl", [long] * 50)
    for model, length in ((BASE, 512), ("owner/name", 2048)):
        name = f"for_{length}"
        main("init", "long.jsonl", "--model", model, "--name", name)
        assert f"\nsequence_length: {length} " in Path(f"recipes/{name}.yaml").read_text()


def test_a_mistyped_folder_of_a_model_is_named_beside_the_one_that_is_like_it(
    working_folder: Path, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows("one.jsonl", [chat(1)])
    Path("smollm").symlink_to(BASE, target_is_directory=True)
    assert main("init", "one.jsonl", "--model", "smolm") == 0
    said = capsys.readouterr().out
    assert "one.yaml: 1 chat\n" in said
    note = "is taken as a name on the hub: no such folder; ./smollm is one"
    assert f"model smolm {note}" in said
    main("plan", "recipe=one")
    assert f"model  smolm, bfloat16, seed 0, {note}" in capsys.readouterr().out
    assert "1 chat is too few" in Path("recipes/one.yaml").read_text()
    assert main("init", "one.jsonl", "--model", "smollm") == 0
    assert "hub" not in capsys.readouterr().out
    Path("SmolLM2-135M-Instruct").symlink_to(BASE, target_is_directory=True)
    main("init", "one.jsonl")  # like the model by default
    assert "no such folder; ./SmolLM2-135M-Instruct is one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "names no file of chats"),
        (["nowhere.jsonl"], "no such file"),
        (["a.jsonl", "--modell", "x"], "Did you mean --model?"),
        (["a.jsonl", "--model"], "has no value"),
        (["bad.jsonl"], "bad.jsonl:1"),
        (["a.jsonl", "--questions", "bad.jsonl"], "a row has the keys x"),
        (["a.jsonl", "--name", "../x"], "is no name of a recipe"),
    ],
)
def test_what_init_cannot_use_is_named(
    words: list[str], expected: str, working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows("a.jsonl", [chat(1)])
    write_rows("bad.jsonl", [{"x": 1}])
    assert main("init", *words) == 2
    assert expected in capsys.readouterr().err
    assert not Path("recipes").exists()


def test_runs_are_listed_with_what_differs(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(working_folder)
    for rate in ("1e-5", "2e-5"):
        run_recipe(Script(), f"sft.lr={rate}")
    capsys.readouterr()
    assert main("runs", "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in found] == ["done"] * 2
    assert sorted(row["differs"]["sft.lr"] for row in found) == ["1e-05", "2e-05"]
    assert all(set(row["differs"]) == {"sft.lr"} for row in found)
    assert any("vs base: pass" in lift for lift in found[0]["lifts"])
    assert main("runs", "recipe=other") == 2
    assert main("runs") == 0
    assert "sft.lr=1e-05" in capsys.readouterr().out
