"""Documents of a gate that were trained on: beside the lift wherever a verdict is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from posttrain.prepare.contamination import GateDocument
from posttrain.run.prepared import Preparer
from tests.support.command import main
from tests.support.fakes import Script, only_run, run_on, scripted_host, write_project

ASKED = "what was the name of the man who painted the tall blue house"
OTHER = "which river is the longest of all in the middle of Africa"
SHOWN = "1 of 2 documents trained on"
GATHERED = Preparer._documents


@pytest.fixture(autouse=True)
def project(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of three holds one of two documents of the gate."""
    write_project(working_folder)
    rows = [(ASKED, "it was Marc"), ("who wrote Faust", "it was Goethe"), ("why", "for it is so")]
    lines = [json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in rows]
    Path("train.jsonl").write_text("".join(lines))
    documents: Sequence[GateDocument] = [GateDocument("some", at, text, "") for at, text in enumerate((ASKED, OTHER))]
    monkeypatch.setattr(Preparer, "_documents", lambda preparer: list(documents))
    monkeypatch.setattr(Preparer, "_compares_with_gates", lambda preparer: True)
    monkeypatch.setattr(Preparer, "_gate_digests", lambda preparer: {})


def trained(action: str) -> Path:
    run_on(scripted_host(Script()), f"sft.prepare.contamination.action={action}")
    return only_run()


def test_it_stands_beside_the_lift_wherever_the_verdict_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("warn")
    for stage in ("sft", "dpo"):  # dpo stands on what sft has learnt
        verdict = json.loads((run / "stages" / stage / "verdict.json").read_text())
        assert verdict["trained_on"] == [{"task": "some", "documents": 2, "trained": 1}]
    lines = [line for line in (run / "report.md").read_text().splitlines() if line.startswith(("| sft |", "| dpo |"))]
    assert [f"vs base; {SHOWN}" in line for line in lines[:2]] == [True, True]
    assert (run / "report.html").read_text().count(SHOWN) >= 4
    assert main("card", str(run / "stages" / "dpo" / "artifact")) == 0
    assert f"; {SHOWN} | base |" in (run / "stages" / "dpo" / "artifact" / "README.md").read_text()
    assert main("report", str(run)) == 0
    assert set(SHOWN.split()) <= set(capsys.readouterr().out.split())  # folded within its column


def test_a_run_that_resumes_confirms_its_verdict() -> None:
    run = trained("warn")
    before = (run / "stages" / "sft" / "verdict.json").read_bytes()
    assert trained("warn") == run
    assert (run / "stages" / "sft" / "verdict.json").read_bytes() == before


def test_rows_that_are_dropped_for_it_are_not_trained_on() -> None:
    run = trained("drop")
    assert json.loads((run / "stages" / "dpo" / "verdict.json").read_text())["trained_on"] == []
    assert "trained on" not in (run / "report.md").read_text()


def test_a_document_of_two_tasks_counts_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [GateDocument(task, at, text, "") for task in ("twin", "some") for at, text in enumerate((ASKED, OTHER))]
    monkeypatch.setattr(Preparer, "_documents", GATHERED)
    monkeypatch.setattr("posttrain.scoring.harness.documents.gate_documents", lambda tasks: iter(asked))
    run = trained("warn")
    found = json.loads((run / "stages" / "sft" / "verdict.json").read_text())["trained_on"]
    assert found == [{"task": "some", "documents": 2, "trained": 1}]
