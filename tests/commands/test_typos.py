"""Misspelt words of every kind: one message that names the word and mends it, and nothing is loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config.paths import shipped
from tests.support.command import main
from tests.support.fakes import write_project

BASE = shipped("recipes") / "quickstart/base"
TYPOS = [
    ("recipee=quickstart", "Did you mean recipe=quickstart?"),
    ("plan recipee=quickstart", "'recipee' is no key, and no recipe is chosen"),
    ("gate adapter=x gat=quickstart", "Did you mean gate=quickstart?"),
    ("plan quickstart", "Did you mean recipe=quickstart?"),
    ("plan quickstrat", "Did you mean recipe=quickstart?"),
    ("plan recipe quickstart", "Choose a recipe with recipe=NAME"),
    ("quickstart", "Did you mean posttrain recipe=quickstart?"),
    ("run recipe=quickstart", "Without it, the recipe runs: posttrain recipe=quickstart"),
    ("plan recipe=./recipes/mine.yaml", "Give a name: recipe=mine"),
    ("plan recipe=recipes/mine", "Give a name: recipe=mine"),
    ("plan recipe=mine --measrue", "Did you mean --measure?"),
    ("plan recipe=mine --potr", "Available: --config-dir, --dry-run, --help, --json, --measure"),
    ("recipe=mine --dryrun", "Did you mean --dry-run?"),
    ("--mutlirun recipe=mine sft.lr=1,2", "Did you mean --multirun?"),
    ("doctor recipe=mine --verbose", "--verbose: is no flag of this command"),
    ("serve nowhere --potr 80", "Did you mean --port?"),
    ("-v serve nowhere", "-v: stands before the command\n    The command comes first: posttrain serve nowhere -v"),
    ("--trust-tasks gate adapter=x", "posttrain gate adapter=x --trust-tasks"),
    ("report --htlm", "--htlm: is no flag of this command"),
    ("list --jsn", "Did you mean --json?"),
    ("export nowhere --too gguf", "Did you mean --to?"),
    ("export nowhere", "Add --to FORM. Available: merged, gguf, gguf-lora"),
    ("init train.jsonl model=x", "Did you mean --model x?"),
    ("list model llama31_8b", "takes one name"),
    ("--vresion", "Did you mean --version?"),
    ("plan recipe=mine fit=24XB", "fit=24XB: names no GPU with figures and no memory\n    Did you mean fit=24GB?"),
    ("plan recipe=mine fit=24", "Did you mean fit=24GB?"),
    ("plan recipe=mine fit=", "a GPU, fit=H100, its memory, fit=24GB, or several, fit='8 x H100'"),
    ("plan recipe=mine on=H1000", "Did you mean on=H100?"),
    ("plan recipe=mine on=0xH100", "names no GPU"),
    ("plan recipe=mine onn=H100", "Did you mean on=H100?"),
    ("plan recipe=mine ft=24GB", "Did you mean fit=24GB?"),
    ("plan recipe=mine spend_cap=5euros", "Did you mean 5 EUR?"),
    ("plan recipe=mine spend_cap=5hous", "Did you mean 5 hours?"),
    ("plan recipe=mine spend_cap=abc", "such as 5 USD, or a time, such as 2 hours"),
    ("plan recipe=mine gate@sft.gte=local", "Did you mean gate@sft.gate=local?"),
    ("plan recipe=mine gate@sfft.gate=local", "Did you mean gate@sft.gate=local?"),
    ("plan recipe=mine stage@kto=kto", "To choose one more, add a +: +stage@kto=kto"),
    ("plan recipe=mine +stge@kto=kto", "Did you mean stage?"),
    ("plan recipe=mine ~stage@dpoo", "Did you mean ~stage@dpo?"),
    ("plan recipe=mine ~sft.lr", "a setting cannot be taken out"),
    ("plan recipe=mine sft.gate=locl", "Choose one by its name: gate@sft.gate=NAME"),
    ("plan recipe=mine launch=slrum", "Did you mean slurm?"),
    ("plan recipe=mine stages=[sft,orop]", "Did you mean orpo? Then add it, too: +stage@orpo=orpo"),
    ("plan recipe=mine lrr=1e-4", "Did you mean sft.lr?"),
    ("plan recipe=mine rnk=16", "Did you mean sft.lora.r?"),
    ("plan recipe=mine ++sft.lrr=1", "Did you mean lr?"),
    ("plan recipe=mine +sft.lora.rr=1", "Did you mean r?"),
    ("plan recipe=mine ++model.pth=1", "Did you mean path?"),
    ("plan recipe=mine sft.data={pth: train.jsonl}", "Did you mean path?"),
    ("-m recipe=mine sft.lr=1e-4,2e-4 selct=best", "Did you mean select=best?"),
    ("-m recipe=mine sft.lr=1e-4,fast", "sft.lr=fast: 'fast' is not a number"),
    ("-m recipe=mine sft.lrr=1,2", "Did you mean sft.lr?"),
    ("gate adaptr=x gate=quickstart", "Did you mean adapter?"),
]


@pytest.fixture
def project(working_folder: Path) -> Path:
    """A folder with a plain recipe ``mine`` of two stages."""
    write_project(working_folder)
    stages = "{sft: {data: train.jsonl}, dpo: {data: pairs.jsonl}}"
    Path("recipes/mine.yaml").write_text(f"model: {BASE}\nstages: {stages}\ngate: none\n")
    return working_folder


def words_of(line: str) -> list[str]:
    *words, last = line.split(" ", 2)
    return [*words, *([last] if "{" in last else last.split(" "))]


@pytest.mark.parametrize(("line", "expected"), TYPOS)
def test_one_message_names_the_word_and_mends_it(
    line: str, expected: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(project.rglob("*"))
    assert main(*words_of(line)) == 2
    captured = capfd.readouterr()
    assert expected in captured.err
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err + captured.out
    assert not [word for word in line.split(" ")[1:] if f"Did you mean {word}?" in captured.err]
    assert sorted(project.rglob("*")) == before


def test_nothing_is_loaded_for_a_misspelt_word(project: Path) -> None:
    lines = [words_of(line) for line, _ in TYPOS] + [["serve", "nowhere"], ["chat", "nowhere"]]
    code = (
        "import json, sys\nfrom posttrain.cli import answer\n"
        f"codes = [answer(words) for words in json.loads({json.dumps(lines)!r})]\n"
        "print('LOADED', json.dumps([codes, sorted(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    codes, loaded = json.loads(result.stdout.rpartition("LOADED")[2])
    assert codes == [2] * len(lines)
    assert not {"torch", "transformers", "lm_eval", "datasets"} & set(loaded)


PLAIN = [
    ("gate: {name: perplexty, data: train.jsonl}\n", "mine.yaml: gate: no gate named 'perplexty'"),
    ("gate: locl\n", "Did you mean local?"),
    ("method: lorra\n", "Did you mean variant: lora?"),
    ("launch: slrum\n", "mine.yaml: launch: no launch named 'slrum'"),
    ("rank: sixteen\n", "mine.yaml: rank: 'sixteen' is not an integer"),
    ("lr: fast\n", "mine.yaml: lr: 'fast' is not a number"),
    ("stages: [sft, dpoo]\n", "Did you mean dpo?"),
    ("data: {pth: train.jsonl}\n", "Did you mean data.path?"),
]


@pytest.mark.parametrize(("text", "expected"), PLAIN)
def test_a_key_of_a_plain_recipe_is_named_as_it_is_written(
    text: str, expected: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rest = "" if text.startswith("data:") else "data: train.jsonl\n"
    Path("recipes/mine.yaml").write_text(f"model: {BASE}\n{rest}{text}")
    assert main("plan", "recipe=mine") == 2
    captured = capfd.readouterr()
    assert expected in captured.err
    assert captured.err.count("error: ") == 1


def test_a_plan_warns_of_targets_that_no_matrix_is_named_by(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("plan", "recipe=quickstart", "stages=[sft]", "sft.lora.target_modules=[q_porj]") == 0
    assert "no matrix is stored by the name q_porj. Did you mean q_proj?" in capsys.readouterr().out
