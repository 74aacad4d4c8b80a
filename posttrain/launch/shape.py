"""The shape of a launch: processes, nodes and engine, and the rules that every plan with one has to keep."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd
from re import fullmatch

from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.config.schema import EngineName
from posttrain.cost.engines import SINGLE, choose_engine, gpus, missing_extra
from posttrain.cost.machines import Machine
from posttrain.cost.needs import Needs, stage_needs
from posttrain.engine.config import LoopConfig
from posttrain.environment import cores
from posttrain.errors import Problem
from posttrain.plan import Plan, Step

OPTIONS = {
    "partition": "partition", "account": "account", "qos": "qos", "time": "time", "gres": "gres", "memory": "mem",
    "constraint": "constraint", "reservation": "reservation",
}  # fmt: skip
"""Settings of a Slurm job, with the names of sbatch's options."""
WORD = r"[\w.:,=/+@&|*()\[\]][\w.:,=/+@&|*()\[\]-]*"
"""Value of such an option: one word that is no option itself."""
ON_LINUX = sys.platform == "linux"
BLOCKS = 2
"""Blocks of a gate that each of its processes gets at least: starting them takes as long as many a block."""
LAUNCHER = "POSTTRAIN_LAUNCHER"
"""Variable of the environment with a launcher of the user's own: a recipe is data and names no program."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The processes of every stage of a plan."""

    nodes: int
    per_node: int
    """Processes on each node."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.nodes * self.per_node


def shape_of(launch: LaunchConfig) -> Shape:
    """Return the shape of a launch; its problems are those of ``check``."""
    if launch.kind is Launcher.none:
        return Shape(nodes=1, per_node=1)
    return Shape(nodes=launch.nodes, per_node=launch.processes or _gpus_of(launch.kind) or 1)


def for_blocks(launch: LaunchConfig, blocks: int) -> LaunchConfig:
    """Return the launch with as many processes as have two of a gate's blocks each: fewer would not pay its start."""
    shape, most = shape_of(launch), max(1, blocks // BLOCKS)
    nodes = min(shape.nodes, -(-most // shape.per_node))
    return replace(launch, nodes=nodes, processes=min(shape.per_node, most // nodes))


def needs_of(plan: Plan, machine: Machine | None = None) -> dict[str, Needs]:
    """Return the memory, the disk and the engine of each stage by name, as far as its settings tell.

    With a ``machine``, they are those of its devices in place of the launch's.
    """
    shape = shape_of(plan.launch)
    if machine is not None:
        return stage_needs(plan, plan.engine.value, machine.count, machine.count, machine)
    return stage_needs(plan, plan.engine.value, shape.world, shape.per_node)


def engine_of(plan: Plan, step: Step) -> str:
    """Return the engine of a stage, never ``auto``."""
    shape = shape_of(plan.launch)
    if shape.world == 1:  # no file of the model has to be read for that
        return SINGLE
    need = needs_of(plan).get(step.name)
    return need.engine if need else choose_engine(plan.engine.value, shape.world, None, None)[0]


def in_slurm_job() -> bool:
    """Return True inside the allocation of a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def _gpus_of(kind: Launcher) -> int:
    """Return the number of GPUs of a node; 0 where it has none, or is not known yet."""
    if kind is not Launcher.slurm:
        return gpus() if kind is Launcher.local else 0
    found = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(found) if found.isdigit() else 0


def check(plan: Plan) -> Sequence[Problem]:
    """Return the problems of a plan's engine and launch."""
    launch = plan.launch
    problems = [*launch_problems(launch)]
    if problems:
        return problems
    world = shape_of(launch).world
    problems = [*_engine_problems(plan, world)]
    if world > 1:
        problems += [problem for step in plan.steps for problem in _stage_problems(step, world)]
    return problems


def launch_problems(launch: LaunchConfig) -> Iterator[Problem]:
    """Yield the problems of a launch by itself."""
    kind, processes = launch.kind, launch.processes
    if kind is Launcher.none:
        if processes is not None or launch.nodes > 1:
            key = "nodes" if processes is None else "processes"
            fix = "Add launch=local for this machine, or launch=slurm"
            yield Problem(where=f"launch.{key}", what="nothing starts other processes", fix=fix)
        return
    if not ON_LINUX:
        what = "several processes need Linux, which ends all of them with the command"
        yield Problem(where="launch", what=what, fix="Leave it out: one process trains here")
        return
    if processes is None and not _gpus_of(kind):
        fix = f"Give launch.processes=N; this machine has {cores()} cores" if kind is Launcher.local else ""
        what = "has no value, and there are no GPUs to count"
        yield Problem(where="launch.processes", what=what, fix=fix or "Give launch.processes=N, the GPUs of a node")
    if kind is Launcher.local:
        yield from _local_problems(launch)
    elif kind is Launcher.slurm:
        yield from _slurm_problems(launch)
    elif not os.environ.get(LAUNCHER):
        fix = f"export {LAUNCHER}='python my_launcher.py': docs/devices.md has some"
        yield Problem(where="launch", what=f"launch=own starts the program in {LAUNCHER}, which is not set", fix=fix)
    if kind is not Launcher.slurm and (strange := [key for key in OPTIONS if getattr(launch, key) is not None]):
        yield Problem(where=f"launch.{strange[0]}", what="belongs to launch=slurm", fix="Leave it out")


def _local_problems(launch: LaunchConfig) -> Iterator[Problem]:
    if launch.nodes > 1:
        fix = "launch=slurm uses several; docs/devices.md has other ways"
        yield Problem(where="launch.nodes", what="launch=local is this machine alone", fix=fix)
    found, what = (gpus(), "GPUs") if gpus() else (cores(), "CPU cores")
    if launch.processes is not None and launch.processes > found:
        given = f"{launch.processes} processes on a machine with {found} {what}"
        yield Problem(where="launch.processes", what=given, fix=f"Give launch.processes={found} or fewer")


def _slurm_problems(launch: LaunchConfig) -> Iterator[Problem]:
    wanted = ("srun", "scontrol") if in_slurm_job() else ("sbatch",)
    if missing := [name for name in wanted if shutil.which(name) is None]:
        what = f"{' and '.join(missing)} not found: this machine is not part of a Slurm cluster"
        yield Problem(where="launch", what=what, fix="Run it where sbatch works, or use launch=local")
    for key in OPTIONS:
        value = getattr(launch, key)
        if value is not None and not fullmatch(WORD, value):
            yield Problem(
                where=f"launch.{key}", what=f"{value!r} is not one word of letters, digits and .:,=/+@&|*()[]-"
            )
    granted = os.environ.get("SLURM_NNODES", "")
    if in_slurm_job() and granted.isdigit() and launch.nodes > int(granted):
        what = f"{launch.nodes} nodes in a Slurm job with {granted}"
        yield Problem(where="launch.nodes", what=what, fix=f"Give launch.nodes={granted} or fewer")


def _engine_problems(plan: Plan, world: int) -> Iterator[Problem]:
    engine = plan.engine
    if engine is EngineName.single and world > 1:
        fix = "Leave out engine, or give engine=ddp, engine=fsdp or engine=deepspeed"
        yield Problem(where="engine", what=f"single trains in one process, but the launch starts {world}", fix=fix)
    if engine not in (EngineName.auto, EngineName.single) and world == 1:
        fix = "Add launch=local launch.processes=2 or more, or leave out engine"
        yield Problem(where="engine", what=f"{engine.value} shares training among processes, but there is one", fix=fix)
    if extra := missing_extra(engine.value):
        fix = f"pip install 'posttrain[{extra}]', or give engine=fsdp"
        yield Problem(where="engine", what=f"{extra} is not installed", fix=fix)


def _stage_problems(step: Step, world: int) -> Iterator[Problem]:
    if not isinstance(step.config, LoopConfig):
        what = f"stages of kind {step.stage.name!r} train in one process, but the launch starts {world}"
        fix = "Run it with launch=none: the same command without launch goes on after the stages that are done"
        yield Problem(where=step.name, what=what, fix=fix)
        return
    size, batches = step.config.per_device_batch_size, step.config.gradient_accumulation
    if step.config.coupled and batches % world:
        what = (
            f"the rows of a forward pass meet in its loss, and {batches} of them cannot be shared by {world} processes"
        )
        fix = f"Give {step.name}.gradient_accumulation={-(-batches // world) * world}"
        yield Problem(where=f"{step.name}.gradient_accumulation", what=what, fix=fix)
    elif (rows := size * batches) % world:
        pace = world // gcd(size, world)
        below, above = batches // pace * pace, -(-batches // pace) * pace
        values = " or ".join(f"{step.name}.gradient_accumulation={value}" for value in (below, above) if value)
        counts = ", ".join(str(count) for count in range(1, rows + 1) if rows % count == 0 and count <= 2 * world)
        what = f"a step of {size} x {batches} = {rows} rows cannot be shared equally by {world} processes"
        yield Problem(
            where=f"{step.name}.gradient_accumulation",
            what=what,
            fix=f"Give {values}, or as many processes as {counts}",
        )
