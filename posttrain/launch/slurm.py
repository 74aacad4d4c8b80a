"""Slurm: a step of a job for every stage, and a job for the whole command, queued again until it is done."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.launch import LaunchConfig
from posttrain.digests import digest_of
from posttrain.disk import write_synced
from posttrain.errors import BadInput, Problem, reject
from posttrain.launch.shape import OPTIONS, shape_of
from posttrain.plan import Plan

LOWEST_PORT, PORTS = 20_000, 10_000
SCRIPT = """\
#!/bin/bash
{options}
# Written by posttrain. The signal before the end of the time, and a preemption, stop the command, which saves and ends
# with 75: the job is queued again, and the same command goes on.
cd {folder} || exit 1
{command} &
child=$! asked=
trap 'asked=1; kill -TERM "$child" 2>/dev/null' TERM
wait "$child"; code=$?
while [ -n "$asked" ]; do  # the signal ended the wait, not the command
  asked=; wait "$child"; again=$?
  [ "$again" -eq 127 ] || code=$again
done
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""


def step(launch: LaunchConfig, torchrun: Sequence[str], worker: Sequence[str]) -> list[str]:
    """Return the command that starts the processes of a stage on the nodes of this job: one torchrun on each."""
    job = os.environ["SLURM_JOB_ID"]
    number = int(job) if job.isdigit() else 0
    meeting = f"{_first_node()}:{launch.port or LOWEST_PORT + number % PORTS}"
    shape = shape_of(launch)
    together = ["--nnodes", str(shape.nodes), "--rdzv-backend", "c10d", "--rdzv-id", job, "--rdzv-endpoint", meeting]
    return [*_srun(launch), *torchrun, *together, *worker]


def _srun(launch: LaunchConfig) -> list[str]:
    words = ["srun", f"--nodes={launch.nodes}", f"--ntasks={launch.nodes}", "--ntasks-per-node=1"]
    # since Slurm 22.05 a step no longer takes its job's cores, and would get one
    found = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return [*words, *([f"--cpus-per-task={found}"] if found.isdigit() else []), "--kill-on-bad-exit=1"]


def _first_node() -> str:
    """Return the node at which the others meet."""
    names = os.environ.get("SLURM_JOB_NODELIST", "")
    found = _call(["scontrol", "show", "hostnames", names], "launch=slurm")
    return found.split()[0] if found.split() else os.uname().nodename


def check_shared(launch: LaunchConfig, path: Path) -> None:
    """Raise BadInput unless every node of the step can read the job's file."""
    if launch.nodes > 1:
        what = f"not every node can read {path}: they share no file system there"
        fix = "Give output_root=DIR that all nodes share"
        _call([*_srun(launch), "test", "-r", str(path)], "output_root", what, fix)


def cancel(processes: Mapping[int, Mapping[str, Any]]) -> None:
    """End the step of these processes at once, wherever they run."""
    steps = {each["step"] for each in processes.values() if each.get("step")}
    for number in steps:
        name = f"{os.environ.get('SLURM_JOB_ID')}.{number}"
        subprocess.run(["scancel", "--signal=KILL", name], check=False, capture_output=True, timeout=60)


def submit(plan: Plan) -> str:
    """Queue the command of a plan as a job; return a line about it. Raises BadInput with what sbatch says."""
    folder = plan.output_root / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plan.recipe}-{digest_of(list(plan.words))[:12]}.sh"
    write_synced(path, script(plan))
    number = _call(["sbatch", "--parsable", str(path)], "launch=slurm").strip().partition(";")[0]
    return f"Slurm job {number} runs {path}; its log is {folder / f'{plan.recipe}-{number}.log'}"


def script(plan: Plan) -> str:
    """Return the script of a job that runs the command of a plan."""
    launch = plan.launch
    log = (plan.output_root / "slurm" / f"{plan.recipe}-%j.log").absolute()
    options = {"job-name": f"posttrain-{plan.recipe}", "nodes": launch.nodes, "ntasks-per-node": 1, "output": log}
    options |= {"signal": f"B:TERM@{round(launch.shutdown_seconds)}", "open-mode": "append"}
    options |= {name: value for key, name in OPTIONS.items() if (value := getattr(launch, key)) is not None}
    lines = ["#SBATCH --requeue", *(f"#SBATCH --{name}={value}" for name, value in options.items())]
    command = shlex.join([sys.executable, "-m", "posttrain", *plan.words])
    return SCRIPT.format(options="\n".join(lines), folder=shlex.quote(os.getcwd()), command=command)


def _call(command: Sequence[str], where: str, what: str = "", fix: str = "") -> str:
    """Return what a command of Slurm prints. Raises BadInput with what it says when it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        reject(where, f"{command[0]} not found: this machine is not part of a Slurm cluster")
    if result.returncode:
        said = " ".join(result.stderr.split())[:300] or f"exit code {result.returncode}"
        raise BadInput(Problem(where=where, what=f"{what or f'{command[0]} failed'}: {said}", fix=fix))
    return result.stdout
