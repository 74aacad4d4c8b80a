from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain import artifact, ledger
from posttrain.artifact import verify
from posttrain.context import StageContext
from posttrain.data.records import Preference
from posttrain.errors import (
    ArtifactDamaged,
    BadInput,
    DiskFailed,
    GateFailed,
    GateUndecided,
    Interrupted,
    PluginFailed,
    PosttrainError,
    Problem,
    RunLocked,
)
from posttrain.gate.spec import GateRequest
from posttrain.hookspecs import hookimpl
from posttrain.plan import Step
from tests.support.fakes import GATES, Script, only_run, run_json, run_recipe, states, write_project


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> Path:
    write_project(working_folder)
    return working_folder


def adapters() -> dict[str, bytes]:
    return {str(p.relative_to(only_run())): p.read_bytes() for p in only_run().rglob("artifact/*.safetensors")}


def test_every_stage_is_trained_judged_promoted_and_recorded() -> None:
    script = Script()
    directory = run_recipe(script)
    assert script.trained == script.judged == ["sft", "dpo"]
    assert states() == {"sft": "promoted", "dpo": "promoted"}
    assert run_json()["state"] == "done"
    sft, dpo = run_json()["stages"]
    assert set(sft) >= {"name", "kind", "state", "artifact", "digest", "parent_digest", "verdict"}
    assert dpo["parent_digest"] == sft["digest"] == verify(directory.path / sft["artifact"]).digest
    assert verify(directory.path / dpo["artifact"]).manifest.lineage == ("sft", "dpo")
    verdict = json.loads((directory.path / "stages/sft/verdict.json").read_text())
    assert verdict["state"] == "pass"
    assert set(verdict["tasks"][0]) >= {
        "task", "metric", "role", "against", "n", "base", "parent", "candidate", "lift", "low", "high", "state",
    }  # fmt: skip
    assert [row.lift.stage for row in ledger.lifts(Path("runs"))] == ["sft", "dpo"]
    assert "+50.0 [+40.0, +60.0] vs base" in (directory.path / "report.md").read_text()
    assert not list(directory.path.rglob("checkpoints"))


def test_the_same_command_trains_and_judges_nothing_the_second_time() -> None:
    run_recipe(Script())
    before = adapters()
    script = Script()
    run_recipe(script)
    assert script.trained == script.judged == []
    assert adapters() == before
    assert len(ledger.lifts(Path("runs"))) == 2


@pytest.mark.parametrize(
    ("verdict", "error", "state"), [("fail", GateFailed, "gate_failed"), ("undecided", GateUndecided, "undecided")]
)
def test_a_verdict_that_is_not_a_pass_stops_the_run(verdict: str, error: type[PosttrainError], state: str) -> None:
    script = Script()
    script.verdicts["sft"] = verdict  # type: ignore[assignment]
    with pytest.raises(error, match=f"sft is a {verdict}"):
        run_recipe(script)
    assert states() == {"sft": state, "dpo": "pending"}
    assert run_json()["state"] == state
    assert script.trained == ["sft"]
    assert verify(only_run() / "stages/sft/artifact")
    assert [row.lift.verdict for row in ledger.lifts(Path("runs"))] == [verdict]


def test_rollback_continues_from_the_parent() -> None:
    script = Script()
    script.verdicts["dpo"] = "fail"
    run_recipe(
        script, "dpo.gate.on_fail=rollback", "+stage@dpo2=dpo", "dpo2.data=pairs.jsonl", "dpo2.gate.enabled=false"
    )
    sft, dpo, dpo2 = run_json()["stages"]
    assert (dpo["state"], dpo2["state"]) == ("gate_failed", "promoted")
    assert dpo["parent_digest"] == dpo2["parent_digest"] == sft["digest"]


def test_warn_continues_from_the_candidate() -> None:
    script = Script()
    script.verdicts["dpo"] = "undecided"
    run_recipe(
        script, "dpo.gate.on_undecided=warn", "+stage@dpo2=dpo", "dpo2.data=pairs.jsonl", "dpo2.gate.enabled=false"
    )
    _, dpo, dpo2 = run_json()["stages"]
    assert dpo["state"] == "undecided"
    assert dpo2["parent_digest"] == dpo["digest"]


def test_nothing_is_stacked_on_a_failed_sft() -> None:
    script = Script()
    script.verdicts["sft"] = "fail"
    with pytest.raises(GateFailed):
        run_recipe(script, "sft.gate.on_fail=rollback")
    assert script.trained == ["sft"]


def test_a_changed_gate_judges_again_without_training() -> None:
    run_recipe(Script())
    script = Script()
    run_recipe(script, "sft.gate.tasks.some.min_lift=0.1")
    assert (script.trained, script.judged) == ([], ["sft"])


def test_a_changed_task_file_judges_again() -> None:
    run_recipe(Script())
    Path("some.yaml").write_text(Path("some.yaml").read_text() + "# changed\n")
    script = Script()
    run_recipe(script)
    assert (script.trained, script.judged) == ([], ["sft", "dpo"])


@pytest.mark.parametrize("override", ["sft.lr=1e-5", "seed=1"])
def test_what_changes_the_training_gets_a_directory_of_its_own(override: str) -> None:
    run_recipe(Script())
    script = Script()
    run_recipe(script, override)
    assert script.trained == ["sft", "dpo"]
    assert len(list(Path("runs").glob("*/run.json"))) == 2


def test_changed_data_gets_a_directory_of_its_own_and_moved_data_does_not() -> None:
    run_recipe(Script())
    Path("train.jsonl").rename("moved.jsonl")
    script = Script()
    run_recipe(script, "sft.data=moved.jsonl")
    assert script.trained == []
    Path("moved.jsonl").write_text(json.dumps({"prompt": "a", "completion": "other"}) + "\n")
    run_recipe(script, "sft.data=moved.jsonl")
    assert script.trained == ["sft", "dpo"]


class Killed(BaseException):
    """The process died here."""


@pytest.mark.parametrize("moment", ["training", "evaluation", "publishing", "finishing"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_that_died_anywhere_is_finished_by_the_same_command(
    moment: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(Script(), "output_root=clean")
    (clean,) = Path("clean").glob("*/run.json")

    def die(subject: StageContext | GateRequest) -> None:
        if (subject.name if isinstance(subject, StageContext) else subject.stage) == stage:
            raise Killed

    class Dying:
        @hookimpl
        def stage_finished(self, stage: str) -> None:
            if stage == dying:
                raise Killed

    dying = stage if moment == "finishing" else ""
    script = Script()
    if moment == "training":
        script.during_training = die
    if moment == "evaluation":
        script.during_evaluation = die
    with monkeypatch.context() as patch:
        if moment == "publishing":
            patch.setattr(
                "posttrain.run.train.publish",
                lambda draft, manifest, to: die_at(manifest.stage, stage, draft, manifest, to),
            )
        with pytest.raises(Killed):
            run_recipe(script, others=[Dying()])
    run_recipe(Script())
    assert states() == {"sft": "promoted", "dpo": "promoted"}
    wanted = {str(p.relative_to(clean.parent)): p.read_bytes() for p in clean.parent.rglob("artifact/*")}
    assert {str(p.relative_to(only_run())): p.read_bytes() for p in only_run().rglob("artifact/*")} == wanted


def die_at(stage: str, dying: str, draft: Path, manifest: artifact.Manifest, to: Path) -> artifact.Artifact:
    if stage == dying:
        (draft / "manifest.json").write_text("half")
        raise Killed
    return artifact.publish(draft, manifest, to)


def test_a_damaged_artifact_is_named_and_not_built_upon() -> None:
    run_recipe(Script())
    path = only_run() / "stages/sft/artifact/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    script = Script()
    with pytest.raises(ArtifactDamaged, match=r"adapter_model\.safetensors"):
        run_recipe(script)
    assert script.trained == []
    assert run_json()["state"] == "failed"


def test_a_second_writer_is_rejected_by_the_name_of_the_first() -> None:
    run_recipe(Script())
    with (only_run() / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunLocked, match=f"process {os.getpid()} on"):
            run_recipe(Script())


def test_what_was_running_when_the_writer_was_killed_is_interrupted_until_its_turn() -> None:
    killed, script = Script(), Script()
    killed.during_evaluation = lambda request: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(killed)
    state = run_json()
    state["state"] = state["stages"][1]["state"] = "running"  # as the death of the machine leaves it
    (only_run() / "run.json").write_text(json.dumps(state))
    seen: list[dict[str, str]] = []
    script.during_evaluation = lambda request: seen.append(states())
    run_recipe(script)
    assert [found["dpo"] for found in seen] == ["interrupted", "trained"]
    assert states() == {"sft": "promoted", "dpo": "promoted"}


def test_a_full_disk_while_publishing_loses_nothing() -> None:
    script = Script()

    def full(context: StageContext) -> None:
        if context.name == "dpo":
            raise OSError(errno.ENOSPC, "No space left on device", str(context.output))

    script.during_training = full
    with pytest.raises(DiskFailed, match="No space left on device"):
        run_recipe(script)
    assert states() == {"sft": "promoted", "dpo": "interrupted"}
    again = Script()
    run_recipe(again)
    assert again.trained == ["dpo"]


def test_a_plugin_that_raises_is_named() -> None:
    script = Script()

    def raising(context: StageContext) -> None:
        if context.name == "dpo":
            raise RuntimeError("out of order")

    script.during_training = raising
    with pytest.raises(PluginFailed, match=r"stage 'dpo' of plugin preference .*RuntimeError: out of order"):
        run_recipe(script)
    assert "out of order" in (only_run() / "stages/dpo/error.txt").read_text()
    assert states()["sft"] == "promoted"


@pytest.mark.parametrize("answer", [None, "pass", True])
def test_an_answer_that_is_no_verdict_is_never_a_pass(answer: object) -> None:
    class Odd:
        @hookimpl(wrapper=True)
        def judge_artifact(self) -> Iterator[None]:  # type: ignore[misc]
            yield
            return answer

    with pytest.raises(PluginFailed, match="never a pass"):
        run_recipe(Script(), others=[Odd()])
    assert states()["sft"] == "trained"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_stage_save_and_stops_as_interrupted(number: signal.Signals) -> None:
    script = Script()
    asked: list[bool] = []

    def stopping(context: StageContext) -> None:
        os.kill(os.getpid(), number)
        asked.append(context.stop_requested())
        raise Interrupted("saved")

    script.during_training = stopping
    with pytest.raises(Interrupted):
        run_recipe(script)
    assert asked == [True]
    assert run_json()["state"] == "interrupted"
    run_recipe(Script())
    assert states() == {"sft": "promoted", "dpo": "promoted"}


def test_a_signal_during_evaluation_stops_at_once() -> None:
    script = Script()
    script.during_evaluation = lambda request: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run_recipe(script)
    assert states() == {"sft": "trained", "dpo": "pending"}


def test_start_from_an_artifact_that_has_been_through_sft() -> None:
    run_recipe(Script(), "stages=[sft]")
    sft = only_run() / "stages/sft/artifact"
    script = Script()
    directory = run_recipe(script, "stages=[dpo]", f"start_from={sft}", "output_root=other")
    assert script.trained == ["dpo"]
    dpo = verify(directory.path / "stages/dpo/artifact")
    assert dpo.manifest.lineage == ("sft", "dpo")
    assert dpo.manifest.parent_digest == verify(sft).digest


def test_start_from_needs_sft_in_the_lineage(project: Path) -> None:
    run_recipe(Script(), "stages=[sft]")
    source = only_run() / "stages/sft/artifact"
    manifest = replace(verify(source).manifest, lineage=("dpo",))
    (source / "manifest.json").unlink()
    other = artifact.publish(source, manifest, project / "other").path
    with pytest.raises(BadInput, match="not on SFT"):
        run_recipe(Script(), "stages=[dpo]", f"start_from={other}")


def test_an_artifact_of_another_base_is_rejected(project: Path) -> None:
    run_recipe(Script(), "stages=[sft]")
    sft = only_run() / "stages/sft/artifact"
    (project / "base" / "config.json").write_text('{"other": 1}')
    with pytest.raises(ArtifactDamaged, match="was trained on base weights"):
        run_recipe(Script(), "stages=[dpo]", f"start_from={sft}", "output_root=other")


def test_bad_records_of_a_later_stage_cost_no_training() -> None:
    Path("pairs.jsonl").write_text('{"prompt": "a"\n')
    script = Script()
    with pytest.raises(BadInput, match=r"pairs\.jsonl:1"):
        run_recipe(script)
    assert script.trained == []


def test_records_of_a_later_stage_are_not_held_while_an_earlier_one_trains() -> None:
    def pairs() -> list[Preference]:
        return [each for each in gc.get_objects() if type(each) is Preference]

    def look(context: StageContext) -> None:
        held[context.name] = any(each not in before for each in pairs())
        known[context.name] = (len(context.records), len(list(context.records)))

    Path("pairs.jsonl").write_text(Path("pairs.jsonl").read_text().replace('"prompt": "', '"prompt": "here: '))
    before = pairs()  # of other tests, whose failures are kept
    held: dict[str, bool] = {}
    known: dict[str, tuple[int, int]] = {}
    script = Script()
    script.during_training = look
    run_recipe(script)
    lines = len(Path("pairs.jsonl").read_text().splitlines())
    assert held["sft"] is False
    assert known["dpo"] == (lines, lines), "the stage itself reads them"


def test_records_of_a_later_stage_that_change_meanwhile_are_not_trained() -> None:
    def change(context: StageContext) -> None:
        if context.name == "sft":
            pairs = Path("pairs.jsonl")
            pairs.write_text(pairs.read_text().replace("a", "b"))
        else:
            list(context.records)

    script = Script()
    script.during_training = change
    with pytest.raises(BadInput, match=r"dpo\.data: the data changed after it was checked"):
        run_recipe(script)


def test_a_gate_that_cannot_work_costs_no_training() -> None:
    class Objecting:
        @hookimpl
        def check_gate(self, step: Step) -> list[Problem]:
            return [Problem(where=f"{step.name}.gate", what="its data set is out of reach")]

    script = Script()
    with pytest.raises(BadInput, match=r"sft\.gate: its data set is out of reach\n.*dpo\.gate"):
        run_recipe(script, others=[Objecting()])
    assert script.trained == []


def test_the_run_tells_when_it_began_and_the_command_that_makes_it_again() -> None:
    run_recipe(Script(), "seed=1")
    first = run_json()
    assert first["command"] == ["posttrain", "recipe=mine", *GATES, "seed=1"]
    run_recipe(Script(), "seed=1", "sft.gate.tasks.some.min_lift=0.1")
    assert run_json()["started"] == first["started"]
    assert run_json()["command"][-1] == "sft.gate.tasks.some.min_lift=0.1"
