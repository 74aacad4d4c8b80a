"""The settings of a launch: schema, default and help in one; nothing but the standard library is imported."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from posttrain.config.ranges import number


class Launcher(Enum):
    """The program that starts the processes of a stage: none, torchrun here, Slurm, or the user's own."""

    none = "none"
    local = "local"
    slurm = "slurm"
    own = "own"


@dataclass(kw_only=True)
class LaunchConfig:
    """The processes that train a stage together, each on a device of its own."""

    kind: Launcher = Launcher.none
    """none (in this process), local (on this machine), slurm, or own: the program in POSTTRAIN_LAUNCHER."""
    processes: int | None = number(None, least=1)
    """Processes on each node; by default one for each of its GPUs."""
    nodes: int = number(1, least=1)
    """Nodes, with launch=slurm or launch=own."""
    port: int | None = number(None, least=1024, most=65535)
    """Port at which several nodes meet; by default one that follows from the number of the Slurm job."""
    silence_seconds: float = number(1800.0, above=0)
    """Seconds without a sign of life after which the processes count as hanging and are ended."""
    shutdown_seconds: float = number(300.0, above=0)
    """Seconds that a stop may take to finish a step and save it; Slurm sends its signal so long before the end."""
    partition: str | None = None
    """Partition of a Slurm job."""
    account: str | None = None
    """Account that a Slurm job is charged to."""
    qos: str | None = None
    """Quality of service of a Slurm job."""
    time: str | None = None
    """Longest time of a Slurm job, such as 12:00:00; it is queued again and resumes."""
    gres: str | None = None
    """Resources of each node of a Slurm job, such as gpu:8."""
    memory: str | None = None
    """Memory of each node of a Slurm job, such as 200G; 0 is all."""
    constraint: str | None = None
    """Features of the nodes of a Slurm job."""
    reservation: str | None = None
    """Reservation of a Slurm job."""
