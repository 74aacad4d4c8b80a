"""What a gate did not pass is never built upon in silence: ``start_from``, ``warn``, and what stands on either."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain import ledger
from posttrain.artifact import DOUBT, publish, verify
from posttrain.commands import run as run_command
from posttrain.errors import BadInput, GateFailed, GateUndecided
from posttrain.gate.spec import VerdictState
from posttrain.report.junit import junit
from posttrain.report.leaderboard import boards
from posttrain.report.run import read_report
from posttrain.run.verdict import read_verdict
from tests.support.command import main
from tests.support.fakes import GATES, Script, run_json, run_recipe, scripted_host, write_project
from tests.support.judgements import sign_verdict


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> Path:
    write_project(working_folder)
    return working_folder


def judged_sft(state: VerdictState) -> Path:
    """An SFT artifact under this verdict."""
    script = Script()
    script.verdicts["sft"] = state
    try:
        run = run_recipe(script, "stages=[sft]").path
    except (GateFailed, GateUndecided):
        (run,) = (path.parent for path in Path("runs").glob("*/run.json"))
    return run / "stages/sft/artifact"


def unjudged_sft(case: str) -> Path:
    """An SFT artifact without a verdict to believe."""
    if case == "no gate":
        return run_recipe(Script(), "stages=[sft]", "sft.gate.enabled=false").path / "stages/sft/artifact"
    sft = judged_sft("pass")
    if case == "copy":
        return Path(shutil.copytree(sft, "copy"))
    verdict = sft.parent / "verdict.json"
    if case == "no verdict":
        verdict.unlink()
    if case == "torn":
        verdict.write_text(verdict.read_text()[:40])
    if case == "of another artifact":
        Path("other").mkdir()
        shutil.copy(verdict, "other/verdict.json")
        other = run_recipe(Script(), "stages=[sft]", "seed=1").path / "stages/sft/artifact"
        return Path(shutil.copytree(other, "other/artifact"))
    return sft


CASES = ["fail", "undecided", "no gate", "copy", "no verdict", "torn", "of another artifact"]


@pytest.mark.parametrize("case", CASES)
def test_what_no_gate_passed_is_no_start_unless_the_recipe_says_so(case: str) -> None:
    sft = judged_sft(case) if case in ("fail", "undecided") else unjudged_sft(case)  # type: ignore[arg-type]
    words = ("stages=[dpo]", f"start_from={sft}", "output_root=other_root")
    told = {"fail": "failed by its gate", "undecided": "left undecided by its gate"}.get(case, "never judged")
    name = f"sft {verify(sft).digest[:12]}"
    script = Script()
    with pytest.raises(BadInput, match=told) as caught:
        run_recipe(script, *words)
    (problem,) = caught.value.problems
    assert problem.where == f"start_from={sft}"
    assert name in problem.what
    assert "start_from_unpromoted=true" in problem.fix
    assert script.trained == []

    run = run_recipe(script, *words, "start_from_unpromoted=true")
    below = f"{name}: {case if case in ('fail', 'undecided') else 'never judged'}"
    (dpo,) = run.state.stages
    assert (dpo.state, dpo.verdict, dpo.unpromoted) == ("unpromoted", "pass", [below])
    assert json.loads((run.path / "stages/dpo/verdict.json").read_text())["unpromoted"] == [below]
    assert [row.lift.unpromoted for row in ledger.lifts(Path("other_root"))] == [below]
    for report in ("report.html", "report.md", "junit.xml"):
        assert below in (run.path / report).read_text()
    with pytest.raises(BadInput, match=f"stands on what no gate passed: {below}"):
        run_recipe(script, "stages=[dpo]", f"start_from={run.path}/stages/dpo/artifact", "output_root=third")


def test_a_promoted_artifact_is_a_start_and_so_is_one_that_was_replaced() -> None:
    sft = judged_sft("pass")
    run_recipe(Script(), "stages=[dpo]", f"start_from={sft}", "output_root=other")
    kept = sft.rename(sft.with_name("artifact.0123456789ab"))
    evidence = sft.parent / "evidence.0123456789ab"
    evidence.mkdir()
    for name in ("verdict.json", "scorecard.jsonl"):
        if (sft.parent / name).exists():
            (sft.parent / name).rename(evidence / name)
    run = run_recipe(Script(), "stages=[dpo]", f"start_from={kept}", "output_root=third")
    assert run.state.stages[0].state == "promoted"


def test_the_plan_says_it_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    sft = judged_sft("fail")
    assert main("plan", "recipe=mine", "stages=[dpo]", f"start_from={sft}") == 2
    assert "failed by its gate" in capsys.readouterr().err
    assert main("plan", "recipe=mine", "start_from_unpromoted=maybe") == 2
    assert "neither true nor false" in capsys.readouterr().err


# --- Runs that went on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "code"), [("fail", 3), ("undecided", 4)])
def test_a_run_that_went_on_after_a_verdict_says_so_everywhere(
    state: VerdictState, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    script.verdicts["sft"] = state
    host = scripted_host(script)
    monkeypatch.setattr(run_command.plugins, "load", lambda: host)
    words = ["recipe=mine", *GATES, f"sft.gate.on_{state}=warn"]
    assert run_command.main(words) == code
    assert script.trained == ["sft", "dpo"]
    assert run_json()["state"] == "warned"
    sft, dpo = run_json()["stages"]
    below = f"sft {sft['digest'][:12]}: {state}"
    assert (sft["state"], dpo["state"]) == ({"fail": "gate_failed"}.get(state, state), "unpromoted")
    assert dpo["unpromoted"] == [below]
    (run,) = (path.parent for path in Path("runs").glob("*/run.json"))
    assert (run / "report.md").read_text().startswith("# mine: warned\n")
    page = (run / "report.html").read_text()
    assert "went on after a verdict that was no pass" in page
    assert "0 of 2 stages promoted" in " ".join(page.split())
    assert below in page
    (board,) = boards(row.lift for row in ledger.lifts(Path("runs")))
    assert {entry.verdict for entry in board.entries} == {state, f"pass on {below}", ""}
    assert 'failures="1"' in junit(read_report(run))
    assert run_command.main(words) == code  # and so does the same command, when there is nothing left to do


def test_a_sweep_ends_with_the_code_of_its_first_member_that_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([0, 3, 0])
    monkeypatch.setattr(run_command, "_run_plan", lambda plan, host, verbose: (next(codes), None))
    assert (
        run_command.main(["-m", "recipe=mine", "sft.gate.enabled=false", "dpo.gate.enabled=false", "seed=1,2,3"]) == 3
    )


def test_a_warned_run_that_passes_after_all_is_done() -> None:
    script = Script()
    script.verdicts["sft"] = "fail"
    run_recipe(script, "sft.gate.on_fail=warn")
    script = Script()
    run = run_recipe(script, "sft.gate.on_fail=warn", "sft.gate.tasks.some.min_lift=0.1")
    assert (script.trained, script.judged) == ([], ["sft", "dpo"])
    assert run_json()["state"] == "done"
    assert [stage.state for stage in run.state.stages] == ["promoted", "promoted"]
    assert [(row.lift.stage, row.lift.unpromoted == "") for row in ledger.lifts(Path("runs"))] == [
        ("sft", True), ("dpo", False), ("sft", True), ("dpo", True),
    ]  # fmt: skip


def test_a_failure_of_posttrain_gate_counts_too(project: Path) -> None:
    sft = judged_sft("pass")
    folder = Path("runs/gates/strict-0123456789ab")
    folder.mkdir(parents=True)
    for name in ("verdict.json", "scorecard.jsonl"):
        shutil.copy(sft.parent / name, folder)
    sign_verdict(folder, state="fail", reason="worse than v1")
    with pytest.raises(BadInput, match=r"failed by its gate: worse than v1 \(.*strict-0123456789ab"):
        run_recipe(Script(), "stages=[dpo]", f"start_from={sft}")


@pytest.mark.parametrize("state", ["pass", "fail"])
def test_what_no_gate_passed_is_not_merged_in_silence(
    state: VerdictState, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.model import merging

    sft = judged_sft(state)
    nothing = merging.Distances(exact=0.0, published=0.0, limit=0.0)
    made = merging.Merge(artifact=verify(sft), distances=nothing)
    told: list[str | None] = []
    monkeypatch.setattr(merging, "merge", lambda artifact, base, output, doubt: told.append(doubt) or made)
    assert main("merge", str(sft), "merged") == 0
    assert ("is failed by its gate" in capsys.readouterr().out) is (state == "fail")
    assert (told != [None]) is (state == "fail")


def test_weights_merged_from_what_no_gate_passed_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    sft = judged_sft("fail")
    folder = next(each for each in (Path("base"), Path("models/base")) if each.is_dir())
    shutil.copytree(folder, "merged")
    manifest = verify(sft).manifest
    publish(Path("merged"), replace(manifest, merge={"adapter": "0", DOUBT: "the sft is failed"}), Path("published"))
    assert main("plan", "recipe=mine", "model.path=published", *GATES) == 0
    assert "stands on what no gate passed: model.path, merged from an adapter: the sft is" in capsys.readouterr().out
    run = run_recipe(Script(), "model.path=published", "stages=[sft]")
    assert run.state.stages[0].state == "unpromoted"
    assert read_verdict(run.path / "stages/sft/verdict.json").verdict.unpromoted == (
        "model.path, merged from an adapter: the sft is failed",
    )
