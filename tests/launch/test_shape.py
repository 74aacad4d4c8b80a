"""Engines and launches that cannot be: one message each, before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.config.compose import compose
from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.config.schema import EngineName, StageConfig
from posttrain.errors import BadInput
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.launch import shape
from posttrain.plan import Plan, make_plan
from posttrain.run.job import step_identity
from posttrain.run.name import label_of, run_digest
from tests.support.command import call, complete

SFT = ("recipe=quickstart", "stages=[sft]")


@pytest.fixture(scope="module")
def host() -> Host:
    return plugins.load()


@pytest.fixture(scope="module")
def default(host: Host) -> Plan:
    return plan(host)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, no GPU, no Slurm."""
    monkeypatch.setattr(shape, "cores", lambda: 2)
    monkeypatch.setattr(shape, "gpus", lambda: 0)
    for name in ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


def plan(host: Host, *words: str) -> Plan:
    return make_plan(compose(host, [*SFT, *words]), host)


def problems(default: Plan, engine: str = "auto", config: Mapping[str, Any] | None = None, **launch: Any) -> str:
    """Return the problems of a plan with another engine, launch and settings of its stage."""
    steps = tuple(replace(step, config=replace(step.config, **(config or {}))) for step in default.steps)
    changed = replace(default, steps=steps, engine=EngineName(engine), launch=LaunchConfig(**launch))
    return "\n".join(map(str, shape.check(changed)))


@pytest.mark.parametrize("kind", [kind for kind in Launcher if kind is not Launcher.none])
def test_a_system_that_cannot_end_processes_together_is_told_so_once(
    default: Plan, monkeypatch: pytest.MonkeyPatch, kind: Launcher
) -> None:
    monkeypatch.setattr(shape, "ON_LINUX", False)
    found = problems(default, kind=kind, processes=2)
    assert found.startswith("launch: several processes need Linux")
    assert len(found.splitlines()) == 2
    assert problems(default) == ""


def bring_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Bring commands of Slurm, and nothing else, into the path."""
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_plan_has_engine_and_launch(host: Host, default: Plan) -> None:
    assert (default.engine, default.launch.kind) == (EngineName.auto, Launcher.none)
    assert shape.shape_of(default.launch).world == 1
    assert shape.engine_of(default, default.steps[0]) == "single"
    two = plan(host, "launch=local", "launch.processes=2", "engine=fsdp")
    assert (shape.shape_of(two.launch).world, shape.engine_of(two, two.steps[0])) == (2, "fsdp")
    assert two.resolved["engine"] == "fsdp"
    assert two.resolved["launch"]["kind"] == "local"
    assert shape.engine_of(replace(two, engine=EngineName.auto), two.steps[0]) == "ddp"
    # no part of the name of a run or an artifact
    assert step_identity(default.steps[0], default) == step_identity(two.steps[0], two)
    source: Any = SimpleNamespace(digest="0")
    assert run_digest(default, source, {"sft": "1"}) == run_digest(two, source, {"sft": "1"})
    assert label_of(two) == label_of(default)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["launch=lokal"], "launch=lokal: no launch named 'lokal'\n    Did you mean local?"),
        (["launch=local", "launch.proceses=2"], "unknown key 'launch.proceses'\n    Did you mean launch.processes?"),
        (["launch.processes=two"], "'two' is not an integer"),
        (["launch=local", "launch.processes=0"], "launch.processes: must be at least 1, not 0"),
        (["engine=dpp"], "engine=dpp: 'dpp' is not one of auto, single, ddp, fsdp, deepspeed"),
        (["launch.processes=2"], "launch.processes: nothing starts other processes\n    Add launch=local"),
    ],
)
def test_words_are_explained(host: Host, words: list[str], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        plan(host, *words)
    assert expected in str(caught.value)


LOCAL, SLURM = Launcher.local, Launcher.slurm


@pytest.mark.parametrize(
    ("launch", "engine", "config", "expected"),
    [
        ({"nodes": 2}, "auto", {}, "launch.nodes: nothing starts other processes"),
        ({"kind": LOCAL}, "auto", {}, "launch.processes: has no value, and there are no GPUs to count"),
        ({"kind": LOCAL, "processes": 3}, "auto", {}, "3 processes on a machine with 2 CPU cores"),
        ({"kind": LOCAL, "processes": 2, "nodes": 2}, "auto", {}, "launch.nodes: launch=local is this machine alone"),
        ({"kind": LOCAL, "processes": 2, "partition": "x"}, "auto", {}, "launch.partition: belongs to launch=slurm"),
        ({"kind": LOCAL, "processes": 2}, "single", {}, "single trains in one process, but the launch starts 2"),
        ({"kind": LOCAL, "processes": 1}, "ddp", {}, "ddp shares training among processes, but there is one"),
        ({"kind": LOCAL, "processes": 1}, "deepspeed", {}, "deepspeed shares training among processes, but there is"),
        ({}, "fsdp", {}, "fsdp shares training among processes, but there is one"),
        (
            {"kind": LOCAL, "processes": 2},
            "auto",
            {"per_device_batch_size": 3, "gradient_accumulation": 5},
            "3 x 5 = 15 rows cannot be shared equally by 2 processes\n    Give sft.gradient_accumulation=4 or sft",
        ),
        ({"kind": Launcher.own, "processes": 2}, "auto", {}, "starts the program in POSTTRAIN_LAUNCHER, which is not"),
        ({"kind": SLURM, "processes": 8}, "auto", {}, "sbatch not found: this machine is not part of a Slurm cluster"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    default: Plan,
    launch: dict[str, Any],
    engine: str,
    config: dict[str, Any],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert expected in problems(default, engine, config, **launch)


def test_gpus_are_counted_where_there_are_some(default: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "gpus", lambda: 4)
    assert shape.shape_of(LaunchConfig(kind=LOCAL)).world == 4
    assert "8 processes on a machine with 4 GPUs" in problems(default, kind=LOCAL, processes=8)


def test_a_stage_off_the_engine_trains_in_one_process(default: Plan) -> None:
    off = replace(default.steps[0], name="mine", config=StageConfig(kind="sft", data="x"))
    assert problems(default, kind=LOCAL, processes=2) == ""
    found = problems(replace(default, steps=(off,)), kind=LOCAL, processes=2)
    assert "mine: stages of kind 'sft' train in one process, but the launch starts 2" in found


def test_a_slurm_job_is_checked(default: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_slurm(tmp_path, monkeypatch, "sbatch", "srun", "scontrol")
    assert problems(default, kind=SLURM, processes=2, nodes=2, partition="gpu", gres="gpu:a100:8", time="1:00:00") == ""
    for value in ("a b", "--wrap=x", "a\nb", ""):
        assert "is not one word" in problems(default, kind=SLURM, processes=2, partition=value)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert "3 nodes in a Slurm job with 2" in problems(default, kind=SLURM, processes=2, nodes=3)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert shape.shape_of(LaunchConfig(kind=SLURM, nodes=2)).world == 4
    (tmp_path / "srun").unlink()
    assert "launch: srun not found" in problems(default, kind=SLURM, processes=2)


def test_launches_are_listed_and_completed() -> None:
    shown = call("list", "launches").stdout
    assert all(name in shown for name in ("none", "local", "slurm"))
    assert "launch.processes: int | None = null\n      Processes on each node" in call("list", "launch").stdout
    assert complete("posttrain recipe=quickstart launch=lo") == ["launch=local"]
    assert "launch.processes=" in complete("posttrain recipe=quickstart launch.pro")


def test_an_engine_needs_its_extra(default: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    several = {"kind": LOCAL, "processes": 2}
    assert problems(default, "deepspeed", **several) == ""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert problems(default, "deepspeed", **several) == (
        "engine: deepspeed is not installed\n    pip install 'posttrain[deepspeed]', or give engine=fsdp"
    )
    assert problems(default, "fsdp", **several) == ""
