"""A stage is trained once below an output root: found by its fingerprint, linked, verified, and kept when replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifact import verify
from posttrain.errors import GateFailed
from posttrain.run.directory import RunDirectory
from tests.support.fakes import Script, run_recipe, write_project

DPO2 = ("+stage@dpo2=dpo", "dpo2.data=pairs.jsonl", "dpo2.lr=1e-4", "dpo2.gate.enabled=false")


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> Path:
    write_project(working_folder)
    return working_folder


def stages(run: RunDirectory) -> dict[str, Mapping[str, Any]]:
    return {stage["name"]: stage for stage in json.loads((run.path / "run.json").read_text())["stages"]}


def log() -> str:
    return Path("log.txt").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ("dpo.beta=0.3",),
        ("stages=[sft]",),
        DPO2,
        ("sft.gate.tasks.some.min_lift=0.1", "dpo.lr=1e-6"),
    ],
    ids=["a later stage's setting", "selected stages", "an added stage", "another gate, too"],
)
def test_a_stage_of_another_run_is_linked_instead_of_trained(overrides: tuple[str, ...]) -> None:
    first = run_recipe(Script())
    script = Script()
    second = run_recipe(script, *overrides)
    assert second.path != first.path
    assert "sft" not in script.trained
    assert "sft" in script.judged  # by its own gate; a real one finds the scores in the cache
    mine, theirs = (verify(run.path / "stages/sft/artifact") for run in (second, first))
    assert (mine.digest, mine.manifest) == (theirs.digest, theirs.manifest)
    assert stages(second)["sft"]["origin"] == f"{first.path.name}/stages/sft/artifact"
    assert f"linked from {first.path.name}/stages/sft/artifact: {mine.digest[:12]}, not trained again" in log()
    assert '"stage": "sft"' in (second.path / "metrics.jsonl").read_text()
    assert f"linked from {first.path.name}" in (second.path / "report.html").read_text()
    for path in mine.path.iterdir():
        assert path.stat().st_nlink == 2
    shutil.rmtree(first.path)
    assert verify(mine.path).digest == mine.digest
    again = Script()
    run_recipe(again, *overrides)
    assert (again.trained, again.judged) == ([], [])


@pytest.mark.parametrize("override", ["sft.checkpoint_steps=3", "sft.checkpoint_minutes=1"])
def test_a_setting_that_changes_no_number_is_the_same_run(override: str) -> None:
    first = run_recipe(Script(), "stages=[sft]")
    script = Script()
    assert run_recipe(script, "stages=[sft]", override).path == first.path
    assert script.trained == []


@pytest.mark.parametrize("override", ["seed=1", "model.dtype=bfloat16", "sft.lr=1e-5", "sft.lora.r=4"])
def test_what_shapes_the_bytes_is_trained_again(override: str) -> None:
    run_recipe(Script(), "stages=[sft]")
    script = Script()
    run_recipe(script, "stages=[sft]", override)
    assert script.trained == ["sft"]


@pytest.mark.parametrize(("package", "trained"), [("torch", ["sft"]), ("tokenizers", ["sft"]), ("lm_eval", [])])
def test_another_version_of_what_trains_is_trained_again(
    package: str, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.run import job

    run_recipe(Script(), "stages=[sft]")
    found = job.versions()
    monkeypatch.setattr(job, "versions", lambda: found | {package: "0.0.1"})
    script = Script()
    run_recipe(script, "stages=[sft]")
    assert script.trained == trained


def test_where_links_are_impossible_the_files_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_recipe(Script(), "stages=[sft]")

    def fail(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    script = Script()
    second = run_recipe(script)
    assert script.trained == ["dpo"]
    found = verify(second.path / "stages/sft/artifact")
    assert found.digest == verify(first.path / "stages/sft/artifact").digest
    assert {path.stat().st_nlink for path in found.path.iterdir()} == {1}


def _flip(artifact: Path) -> None:
    path = artifact / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _remove(artifact: Path) -> None:
    (artifact / "tokenizer.json").unlink()


def _symlink(artifact: Path) -> None:
    (artifact / "tokenizer.json").rename("elsewhere.json")
    (artifact / "tokenizer.json").symlink_to(Path("elsewhere.json").absolute())


def _claim(artifact: Path) -> None:
    from posttrain.digests import digest_of

    values = json.loads((artifact / "manifest.json").read_text()) | {"parent_digest": "0" * 64}
    del values["digest"]
    (artifact / "manifest.json").write_text(json.dumps(values | {"digest": digest_of(values)}))


@pytest.mark.parametrize("damage", [_flip, _remove, _symlink, _claim])
def test_a_damaged_one_elsewhere_is_not_used_and_named(damage: Any) -> None:
    first = run_recipe(Script(), "stages=[sft]")
    damage(first.path / "stages/sft/artifact")
    script = Script()
    second = run_recipe(script)
    assert script.trained == ["sft", "dpo"]
    assert f"{first.path}/stages/sft/artifact is not used: " in log().replace("\n", "")
    assert stages(second)["sft"]["origin"] is None
    assert {path.stat().st_nlink for path in (second.path / "stages/sft/artifact").iterdir()} == {1}


@pytest.mark.parametrize("content", [None, "", "[]", '{"fingerprint": 1}', "[" * 5000])
def test_a_strange_folder_in_another_run_is_in_nobodys_way(content: str | None) -> None:
    folder = Path("runs/other/stages/sft/artifact")
    folder.mkdir(parents=True)
    if content is None:
        os.mkfifo(folder / "manifest.json")
    else:
        (folder / "manifest.json").write_text(content)
    script = Script()
    run_recipe(script, "stages=[sft]")
    assert script.trained == ["sft"]


class Killed(BaseException):
    """The process died here."""


@pytest.mark.parametrize(
    "moment", ["os.link", "posttrain.run.published.verify", "posttrain.run.published._Linked._curves"]
)
def test_a_kill_while_linking_leaves_nothing_half(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(Script(), "stages=[sft]")

    def die(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(moment, die)
        with pytest.raises(Killed):
            run_recipe(Script())
    assert len(list(Path("runs").glob("*/stages/sft/artifact"))) == 1
    script = Script()
    second = run_recipe(script)
    assert script.trained == ["dpo"]
    assert not list(second.path.rglob(".draft"))
    assert stages(second)["sft"]["origin"]


def test_an_origin_that_disappears_while_it_is_linked_is_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_recipe(Script(), "stages=[sft]")
    real = os.link

    def remove_then_link(source: Path, target: Path) -> None:
        shutil.rmtree(first.path, ignore_errors=True)
        real(source, target)

    monkeypatch.setattr(os, "link", remove_then_link)
    script = Script()
    run_recipe(script)
    assert script.trained == ["sft", "dpo"]


def test_two_runs_at_once_do_not_break_each_other() -> None:
    inner: list[RunDirectory] = []

    def start_another(context: Any) -> None:
        if context.name == "sft" and not inner:
            inner.append(run_recipe(Script(), "dpo.beta=0.3"))

    script = Script()
    script.during_training = start_another
    outer = run_recipe(script)
    assert script.trained == ["sft", "dpo"]  # the other's was not there yet when this one looked
    found = [verify(run.path / "stages" / name / "artifact") for run in (outer, *inner) for name in ("sft", "dpo")]
    assert found[0].digest == found[2].digest
    third = Script()
    run_recipe(third, "dpo.beta=0.5")
    assert third.trained == ["dpo"]


def test_only_what_is_found_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        run_recipe(Script(), "stages=[sft]", f"seed={seed}")
    hashed: list[Path] = []
    monkeypatch.setattr("posttrain.run.published.verify", lambda path: hashed.append(path) or verify(path))
    run_recipe(Script(), "seed=1", "dpo.gate.enabled=false")
    assert [path.name for path in hashed] == [".draft"]


def test_a_kill_before_the_state_is_written_leaves_the_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_recipe(Script(), "stages=[sft]")

    def die(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.run.train._describe", die)
        with pytest.raises(Killed):
            run_recipe(Script())
    assert stages(run_recipe(Script()))["sft"]["origin"] == f"{first.path.name}/stages/sft/artifact"


def test_a_stage_judged_by_another_gate_of_one_name_keeps_the_evidence_of_the_first() -> None:
    folder = run_recipe(Script(), "stages=[sft]").path / "stages/sft"
    before = {name: (folder / name).read_bytes() for name in ("verdict.json", "scorecard.jsonl")}
    run_recipe(Script(), "stages=[sft]", "sft.gate.tasks.some.min_lift=0.1")
    assert (folder / "verdict.json").read_bytes() != before["verdict.json"]
    (kept,) = folder.glob("evidence.*")
    assert {name: (kept / name).read_bytes() for name in before} == before
    assert f"the former verdict, pass, is kept in {kept.name}" in log()


# --- One run under several policies -----------------------------------------------------------------------------------

FAILING = (
    "+stage@dpo2=dpo", "dpo2.data=pairs.jsonl", "dpo2.lr=1e-4",
    "+dpo2.gate.tasks.some={role: lift, metric: acc, task: some.yaml}",
)  # fmt: skip


def failing_dpo() -> Script:
    script = Script()
    script.verdicts["dpo"] = "fail"
    return script


def under(policy: str) -> tuple[RunDirectory, Script]:
    script = failing_dpo()
    return run_recipe(script, *FAILING, f"dpo.gate.on_fail={policy}"), script


def test_a_run_under_another_policy_tells_its_truth_and_keeps_what_it_replaces() -> None:
    rolled, _ = under("rollback")
    first = {name: stage["digest"] for name, stage in stages(rolled).items()}
    assert stages(rolled)["dpo2"]["state"] == "promoted"
    assert stages(rolled)["dpo2"]["parent_digest"] == first["sft"]

    warned, script = under("warn")
    assert (warned.path, script.trained) == (rolled.path, ["dpo2"])
    dpo2 = stages(warned)["dpo2"]
    assert (dpo2["state"], dpo2["verdict"], dpo2["parent_digest"]) == ("unpromoted", "pass", first["dpo"])
    assert dpo2["unpromoted"] == [f"dpo {first['dpo'][:12]}: fail"]
    kept = warned.path / f"stages/dpo2/artifact.{first['dpo2'][:12]}"
    assert verify(kept).digest == first["dpo2"]
    assert f"replaced: {first['dpo2'][:12]}, kept as {kept.name}" in log()

    with pytest.raises(GateFailed):
        under("stop")
    left = json.loads((rolled.path / "run.json").read_text())
    assert {stage["name"]: stage["state"] for stage in left["stages"]} == {
        "sft": "promoted", "dpo": "gate_failed", "dpo2": "pending",
    }  # fmt: skip
    assert left["stages"][2]["digest"] is None
    assert not (rolled.path / "stages/dpo2/artifact").exists()
    assert verify(rolled.path / f"stages/dpo2/artifact.{dpo2['digest'][:12]}").digest == dpo2["digest"]

    again, script = under("rollback")
    assert script.trained == []
    assert stages(again)["dpo2"] | {"seconds": 0} == stages(rolled)["dpo2"] | {"seconds": 0}
    assert {name: stage["digest"] for name, stage in stages(again).items()} == first
    assert stages(again)["dpo2"]["state"] == "promoted"
    assert "brought back: " in log()
    rows = [json.loads(line) for line in (again.path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(row["stage"] for row in rows) == ["dpo", "dpo2", "sft"]


def test_what_was_replaced_is_found_by_other_runs_too() -> None:
    rolled, _ = under("rollback")
    digest = stages(rolled)["dpo2"]["digest"]
    under("warn")
    script = failing_dpo()
    other = run_recipe(script, *FAILING, "dpo.gate.on_fail=rollback", "stages=[sft,dpo2]")
    assert script.trained == []
    assert stages(other)["dpo2"]["digest"] == digest
    assert stages(other)["dpo2"]["origin"] == f"{rolled.path.name}/stages/dpo2/artifact.{digest[:12]}"


def test_a_stage_yet_to_come_is_not_called_promoted_while_its_parent_is_made_anew() -> None:
    words = (*FAILING, "+stage@dpo3=dpo", "dpo3.data=pairs.jsonl", "dpo3.lr=2e-4", "dpo3.gate.enabled=false")
    run_recipe(failing_dpo(), *words, "dpo.gate.on_fail=rollback")
    script = failing_dpo()
    seen: dict[str, str] = {}

    def look(context: Any) -> None:
        (state,) = Path("runs").glob("*/run.json")
        found = {stage["name"]: stage["state"] for stage in json.loads(state.read_text())["stages"]}
        seen[context.name] = found["dpo3"]

    script.during_training = look
    run_recipe(script, *words, "dpo.gate.on_fail=warn")
    assert seen == {"dpo2": "pending", "dpo3": "running"}


def test_what_was_linked_replaced_and_brought_back_still_names_its_origin() -> None:
    first, _ = under("rollback")
    more = (*FAILING, "+stage@dpo3=dpo", "dpo3.data=pairs.jsonl", "dpo3.lr=2e-4", "dpo3.gate.enabled=false")
    for policy in ("rollback", "warn", "rollback"):
        run = run_recipe(failing_dpo(), *more, f"dpo.gate.on_fail={policy}")
        origin = stages(run)["dpo2"]["origin"]
        assert origin == (None if policy == "warn" else f"{first.path.name}/stages/dpo2/artifact")
