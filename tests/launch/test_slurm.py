"""Slurm, with stand-ins for its commands: a step for every stage, a job for the command, queued again after 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.config.compose import compose
from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.errors import BadInput, Interrupted, PosttrainError
from posttrain.host.plugins import Host
from posttrain.launch import slurm
from posttrain.launch.group import Group
from posttrain.plan import Plan, make_plan
from tests.launch.test_group import PROCESSES, SFT, context, left, recorder, seen, wait_for

SRUN = """\
#!/bin/sh
echo "srun $*" >> calls
case "$*" in *" test -r "*) [ -z "$NOT_SHARED" ]; exit $?;; esac
for job in "$@"; do :; done
export SLURM_STEP_ID=4
exec {python} {processes} "$job"
"""
SCONTROL = """\
#!/bin/sh
echo "scontrol $*" >> calls
[ "$1" != show ] || printf 'node7\\nnode8\\n'
"""
SBATCH = """\
#!/bin/sh
echo "sbatch $*" >> calls
[ -z "$CLOSED" ] || { echo "sbatch: error: invalid partition" >&2; exit 1; }
echo "31;cluster"
"""
SCANCEL = '#!/bin/sh\necho "scancel $*" >> calls\n'


@pytest.fixture(autouse=True)
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a cluster, and the variables of a job on two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    srun = SRUN.format(python=sys.executable, processes=PROCESSES)
    for name, text in {"srun": srun, "scontrol": SCONTROL, "sbatch": SBATCH, "scancel": SCANCEL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "31", "NNODES": "2", "JOB_NODELIST": "node[7-8]", "CPUS_ON_NODE": "16"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def calls() -> str:
    return Path("calls").read_text()


def make_group(folder: Path, **settings: float) -> Group:
    launch = LaunchConfig(kind=Launcher.slurm, nodes=2, processes=1, **settings)  # type: ignore[arg-type]
    return Group(launch=launch, folder=folder / "stage", origin="posttrain 0")


def test_a_stage_is_a_step_with_torchrun_on_every_node(tmp_path: Path) -> None:
    given = context(tmp_path)
    make_group(tmp_path)(SFT, given)
    assert given.metrics["steps"] == 10
    assert "2 processes, engine ddp" in recorder(given).notes
    shared, start = [line for line in calls().splitlines() if line.startswith("srun")]
    step = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=16 --kill-on-bad-exit=1"
    assert shared == f"{step} test -r {tmp_path}/stage/job.json"
    assert start.startswith(
        f"{step} {sys.executable} -m torch.distributed.run --nproc-per-node 1 --shutdown-timeout 300"
    )
    meeting = "--nnodes 2 --rdzv-backend c10d --rdzv-id 31 --rdzv-endpoint node7:20031"
    assert start.endswith(f"{meeting} -m posttrain.launch.worker {tmp_path}/stage/job.json")


def test_a_stop_reaches_the_processes_through_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", "wait")
    given = context(tmp_path, stop_requested=lambda: len(seen(tmp_path)) == 2)
    with pytest.raises(Interrupted, match="stopped after step 3 of 10"):
        make_group(tmp_path)(SFT, given)


def test_a_step_that_hangs_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", "hang")
    with pytest.raises(PosttrainError, match=r"rank . of 2 hung"):
        make_group(tmp_path, silence_seconds=10.0)(SFT, context(tmp_path))
    assert "scancel --signal=KILL 31.4" in calls()
    wait_for(lambda: not left(tmp_path))


def test_nodes_without_a_shared_folder_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOT_SHARED", "1")
    with pytest.raises(BadInput, match=r"output_root: not every node can read .*/job\.json: they share no file system"):
        make_group(tmp_path)(SFT, context(tmp_path))


@pytest.fixture(scope="module")
def planned(host: Host) -> Plan:
    plan = make_plan(compose(host, ["recipe=quickstart", "stages=[sft]"]), host)
    launch = LaunchConfig(
        kind=Launcher.slurm, nodes=2, processes=8, partition="gpu", gres="gpu:8", shutdown_seconds=120
    )
    return replace(plan, launch=launch)


def test_a_command_outside_of_a_job_is_queued_as_one(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm.submit(planned).startswith("Slurm job 31 runs runs/slurm/quickstart-")
    (path,) = Path("runs/slurm").glob("*.sh")
    assert calls() == f"sbatch --parsable {path}\n"
    options = [line.removeprefix("#SBATCH ") for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--nodes=2", "--partition=gpu", "--gres=gpu:8", "--signal=B:TERM@120"} <= set(options)
    assert f"--output={Path('runs/slurm').absolute()}/quickstart-%j.log" in options
    assert "-m posttrain recipe=quickstart 'stages=[sft]' &" in path.read_text()
    monkeypatch.setenv("CLOSED", "1")
    with pytest.raises(BadInput, match="launch=slurm: sbatch failed: sbatch: error: invalid partition"):
        slurm.submit(planned)


PROGRAM = """\
#!/bin/bash
trap 'sleep 0.3; exit 75' TERM
touch begun
case "$(cat code)" in wait) while :; do sleep 0.05; done;; *) exit "$(cat code)";; esac
"""


def run_script(tmp_path: Path, planned: Plan, monkeypatch: pytest.MonkeyPatch, code: str) -> subprocess.Popen[bytes]:
    """Start the script of a job; its command ends with ``code``, or waits for a signal."""
    program = tmp_path / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "code").write_text(code)
    (tmp_path / "script").write_text(slurm.script(planned))
    return subprocess.Popen(["bash", str(tmp_path / "script")], cwd="/")


@pytest.mark.parametrize("code", ["0", "2", "3", "75"])
def test_a_job_ends_with_the_code_of_its_command(
    tmp_path: Path, planned: Plan, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    assert run_script(tmp_path, planned, monkeypatch, code).wait() == int(code)
    assert Path("calls").exists() == (code == "75")


def test_a_signal_to_a_job_reaches_its_command_and_queues_it_again(
    tmp_path: Path, planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run_script(tmp_path, planned, monkeypatch, "wait")
    wait_for(Path("begun").exists)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert calls() == "scontrol requeue 31\n"
