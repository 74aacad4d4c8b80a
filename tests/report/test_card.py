"""The model card: every figure of the verdict, read back by the hub's own parser, and nothing that is not recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from posttrain.artifact import verify
from tests.support.command import main
from tests.support.fakes import Script, only_run, run_recipe, write_project


def judged(folder: Path, script: Script | None = None, *overrides: str) -> Path:
    """The stage ``dpo`` of a run under a script."""
    write_project(folder)
    run_recipe(script or Script(), *overrides)
    return only_run() / "stages" / "dpo"


def metrics(card: ModelCard) -> list[dict[str, Any]]:
    (model,) = card.data.to_dict()["model-index"]
    return [metric for result in model["results"] for metric in result["metrics"]]


def test_every_number_of_the_verdict_is_in_the_card(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = judged(working_folder)
    (working_folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    assert main("card", str(stage / "artifact"), "base_model=owner/base") == 0
    card = ModelCard.load(stage / "artifact" / "README.md")
    tasks = json.loads((stage / "verdict.json").read_text())["tasks"]
    assert len(metrics(card)) == len(tasks) > 0
    for metric, task in zip(metrics(card), tasks, strict=True):
        assert metric["value"] == task["candidate"]
        numbers = {name: value for name, value in task.items() if isinstance(value, (int, float))}
        assert {name: metric["args"][name] for name in numbers} == numbers
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/base", "adapter")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "peft")
    assert "| some: acc | lift | 100 | 10.0 | 10.0 | 60.0 | +50.0 [+40.0, +60.0] | base | pass |" in card.text
    run = json.loads((only_run() / "run.json").read_text())
    for entry in run["stages"]:
        assert entry["digest"][:12] in card.text
    assert "    posttrain recipe=mine" in card.text
    assert "rows of the ledger" in card.text
    assert str(working_folder) not in card.content
    assert "card       " in capsys.readouterr().out


def test_a_card_is_about_an_artifact_and_no_part_of_it(working_folder: Path) -> None:
    artifact = judged(working_folder) / "artifact"
    before = verify(artifact).digest
    assert main("card", str(artifact)) == 0
    assert verify(artifact).digest == before
    (artifact / "other.txt").write_text("x")
    assert main("card", str(artifact)) == 5


def test_what_was_overridden_and_not_measured_is_said(working_folder: Path) -> None:
    script = Script()
    script.verdicts = {"sft": "fail", "dpo": "undecided"}
    stage = judged(working_folder, script, "sft.gate.on_fail=warn", "dpo.gate.on_undecided=warn")
    assert main("card", str(stage / "artifact")) == 0
    text = (stage / "artifact" / "README.md").read_text()
    assert "not promoted: it was left undecided by its gate" in text
    overridden, _, rest = text.partition("## Overridden")[2].partition("## Not measured")
    assert "on_undecided: warn" in overridden
    assert "which no gate passed" in overridden
    for words in ("undecided", "licence of the base: none is recorded", "exports: none"):
        assert words in rest
    assert "base_model:" not in text.partition("# ")[0], "a folder of this machine is no name on the hub"


def test_an_artifact_without_a_verdict_says_so(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = judged(working_folder)
    (stage / "artifact").rename("alone")
    assert main("card", "alone", "output=card.md") == 0
    text = Path("card.md").read_text()
    assert "it was never judged" in text
    assert "anything: no gate has judged this artifact" in text
    assert ModelCard(text).data.eval_results is None
    for words, expected in ((["alone", "b"], "needs one artifact"), (["nowhere"], "no such directory")):
        assert main("card", *words) == 2
        assert expected in capsys.readouterr().err


def test_a_changed_verdict_makes_no_card(working_folder: Path) -> None:
    stage = judged(working_folder)
    text = (stage / "verdict.json").read_text()
    (stage / "verdict.json").write_text(text.replace('"candidate": 0.6', '"candidate": 0.9'))
    assert main("card", str(stage / "artifact")) == 5
    assert not (stage / "artifact" / "README.md").exists()
