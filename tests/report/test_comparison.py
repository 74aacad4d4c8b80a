"""The page that compares runs: what differs stands side by side, and nothing in it can act."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.gate.spec import DocumentScore
from posttrain.scoring.scorecard import write_scorecard
from tests.support.command import main
from tests.support.fakes import Script, only_run, run_recipe, write_project
from tests.support.judgements import sign_verdict, task_verdict
from tests.support.pages import read_page

HOSTILE = '</pre><script>alert("1")</script>'


def give_scores(run: Path, right: int, answer: str) -> None:
    """Let the candidate of a run's first stage answer so many of four questions right."""
    rows = [
        DocumentScore(
            system="candidate", digest="d", task="some", filter="none", doc_id=number, document_hash=f"h{number}",
            request_hash="", target_hash="", metrics={"acc": float(number < right)}, response=f"{answer} {number}",
            target=f"right {number}",
        )
        for number in range(4)
    ]  # fmt: skip
    folder = run / "stages" / "sft"
    write_scorecard(folder / "scorecard.jsonl", rows)
    lines = [json.dumps({"task": "some", "doc_id": number, "prompt": f"asked {number}"}) for number in range(4)]
    (folder / "questions.jsonl").write_text("".join(f"{line}\n" for line in lines))
    sign_verdict(folder, tasks=[vars(replace(task_verdict("pass"), candidate=right / 4))])


def test_what_differs_between_runs_stands_side_by_side(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(working_folder)
    run_recipe(Script())
    one = only_run()
    other = Path(shutil.copytree(one, one.with_name("mine-other")))
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 7", 1))
    give_scores(one, 2, "the first says")
    give_scores(other, 3, HOSTILE)
    capsys.readouterr()
    assert main("runs", "--html") == 0
    assert capsys.readouterr().out.strip() == "runs/runs.html"
    text = Path("runs/runs.html").read_text()
    assert 'href="mine-other/report.html"' in text
    page = read_page(re.sub(r'href="[\w-]+/report.html"', 'href="#runs"', text))  # links to other pages of its own
    words = " ".join(page.text.split())
    assert "2 runs side by side" in words
    assert "seed" in words
    for expected in ("50.0, +50.0 [+40.0, +60.0], n 100", "75.0, +50.0", "1 question scored differently"):
        assert expected in words
    assert "asked 2" in words
    assert "right 2" in words
    assert "the first says 2" in words
    assert "asked 1" not in words  # answered as well by both
    assert "<script" not in text
    assert "script-src" not in text
    assert text.count("<figure") == 4  # the losses of two stages of two runs
    assert main("runs", "mine-other", "--html") == 0
    assert "1 run side by side" in Path("runs/runs.html").read_text()
    assert main("runs", "none", "--html") == 2
    assert "Available: mine-" in capsys.readouterr().err
