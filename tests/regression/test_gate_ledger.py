"""What ``posttrain gate`` judged stands in the ledger and on the leaderboard, beside what runs have made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import cli
from posttrain.ledger import lifts
from tests.support.adapters import write_adapters

Posttrain = Callable[..., int]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


def posttrain(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(str(ended.value.code))


def gate(material: Path, name: str, *words: str) -> int:
    return posttrain("gate", f"adapter={material / name}", "gate=quiz", "--config-dir", str(material / "conf"), *words)


def exported(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert posttrain("ledger", "export") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_verdict_is_recorded_once(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(material, "good") == 0
    assert gate(material, "good") == 0
    assert gate(material, "artifact") == 0
    assert gate(material, "other", "gate.tasks.quiz.min_lift=0.9") == 3
    assert gate(material, "good", "gate.tasks.quiz.limit=2") == 4
    rows = exported(capsys)
    assert [(row["stage"], row["lineage"], row["n"], row["verdict"]) for row in rows] == [
        ("good", "adapter", 48, "pass"),
        ("sft", "sft", 48, "pass"),
        ("other", "adapter", 48, "fail"),
        ("good", "adapter", 2, "undecided"),
    ]
    first = rows[0]
    assert first["recipe"] == first["task"] == "quiz"
    assert first["low"] < first["lift"] == first["candidate_score"] - first["base_score"] < first["high"]
    assert first["recorded_by"]
    assert len({row["base"] for row in rows}) == 1


def test_a_baseline_is_the_parent(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(material, "other") in (3, 4)
    assert gate(material, "good", f"baseline={material / 'other'}") == 0
    alone, over_base, over_other = exported(capsys)
    assert [over_base["against"], over_other["against"]] == ["base", "baseline"]
    assert alone["parent"] != over_base["parent"] == over_other["parent"] == alone["artifact"]
    assert over_base["parent_score"] == over_other["parent_score"] == alone["candidate_score"]


def test_what_was_gated_is_on_the_leaderboard(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate(material, "good")
    gate(material, "other")
    capsys.readouterr()
    assert posttrain("leaderboard", "--format", "json") == 0
    (board,) = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in board["entries"][:2]] == ["quiz good", "quiz other"]
    assert board["entries"][2]["lineage"] == "base"


def test_the_ledger_can_be_rebuilt_from_what_gates_left(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(material, "good") == 0
    assert gate(material, "good", "gate.tasks.quiz.limit=2") == 4
    before = lifts(Path("runs"))
    Path("runs/ledger.sqlite").unlink()
    assert posttrain("ledger", "rebuild") == 0
    assert lifts(Path("runs")) == before
    assert posttrain("ledger", "verify") == 0
    history, _ = Path("runs/gates").glob("*/lifts.jsonl")
    history.unlink()
    assert posttrain("ledger", "verify") == 5
    assert "is not in its run" in capsys.readouterr().err
    shutil.rmtree("runs/gates")  # as where only the ledger is kept
    assert posttrain("ledger", "verify") == 0


def test_with_a_baseline_every_document_is_compared(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = "gate.sequential=obrien_fleming"
    assert gate(material, "good", early) == 0
    assert gate(material, "good", early, f"baseline={material / 'artifact'}") == 0  # of equal weights: no lift
    found = {(row["against"], row["n"]) for row in exported(capsys)}
    assert found == {("base", 20), ("base", 48), ("baseline", 48)}


OTHER_SETTINGS = ("gate.tasks.quiz.min_lift=0.2", "gate.on_fail=warn", "gate.seed=1", "model.dtype=bfloat16")
"""Each makes another gate of one name."""


def test_gates_of_one_name_keep_their_evidence_apart(material: Path) -> None:
    assert gate(material, "good") == 0
    first = next(Path("runs/gates").iterdir())
    kept = {path.name: path.read_bytes() for path in first.iterdir()}
    for number, setting in enumerate(OTHER_SETTINGS, start=2):
        assert gate(material, "good", setting) == 0, setting
        assert len(list(Path("runs/gates").iterdir())) == number, setting
    assert gate(material, "good") == 0
    assert {path.name: path.read_bytes() for path in first.iterdir()} == kept
    assert len({lift.lift.run for lift in lifts(Path("runs"))}) == len(OTHER_SETTINGS) + 1


def test_a_lax_gate_of_the_same_name_hides_no_strict_one(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(material, "other", "gate.tasks.quiz.min_lift=0.9", "junit=strict.xml", "markdown=strict.md") == 3
    gate(material, "other", "gate.tasks.quiz.min_lift=-1", "junit=lax.xml", "markdown=lax.md")
    capsys.readouterr()
    assert posttrain("leaderboard", "--format", "json") == 0
    (board,) = json.loads(capsys.readouterr().out)
    assert "fail, pass" in {entry["verdict"] for entry in board["entries"]}
    for kind in ("xml", "md"):
        evidence = [path.name for path in Path("runs/gates").iterdir()]
        found = [name for file in ("strict", "lax") for name in evidence if name in Path(f"{file}.{kind}").read_text()]
        assert sorted(found) == sorted(evidence)


def test_another_baseline_file_is_another_gate(material: Path) -> None:
    assert gate(material, "good", "baseline=one.json", "--update-baseline") == 0
    assert gate(material, "good", "baseline=one.json") == 0
    assert len(list(Path("runs/gates").iterdir())) == 2
