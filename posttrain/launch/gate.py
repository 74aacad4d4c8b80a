"""Processes that ask the systems of a gate, block by block, and their job: ``gate.json`` and the requests beside it.

The command keeps verdict, ledger and display: it scores the answers that the processes leave in the cache.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.disk import naming, write_synced
from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import GateProgress
from posttrain.launch import slurm
from posttrain.launch.group import Watch, figures
from posttrain.launch.job import FOLDER, GATE_JOB, REQUESTS, as_json, read_checked, source_of, versions
from posttrain.launch.shape import for_blocks, shape_of
from posttrain.launch.signs import Signs
from posttrain.saved import as_kind, plain
from posttrain.scoring.inquiry import Inquiry, Part, Place, Tally


@dataclass(frozen=True, kw_only=True)
class GateJob:
    """The questions of a gate as its processes get them."""

    versions: Mapping[str, str]
    """Versions of all that answers depend on; processes with others are rejected."""
    systems: Mapping[str, Mapping[str, Any]]
    dtype: str
    device: str
    seed: int
    size: int
    cache: str
    parts: tuple[Part, ...]
    world: int
    """Number of processes."""
    requests: str
    """SHA-256 of the requests' file."""
    silence_seconds: float
    """Seconds without a sign of life after which a process counts as hanging."""
    command: int | None
    """Process of the command, from which all of these descend; None where others start them."""

    def inquiry(self) -> Inquiry:
        """Return the questions."""
        return Inquiry(
            systems={name: source_of(values) for name, values in self.systems.items()}, dtype=self.dtype,
            device=self.device, seed=self.seed, size=self.size, cache=Path(self.cache), parts=self.parts,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GateGroup:
    """Several processes for the questions of a gate."""

    launch: LaunchConfig

    def __call__(
        self,
        inquiry: Inquiry,
        requests: Iterable[tuple[Place, Sequence[Any]]],
        folder: Path,
        progress: GateProgress,
        is_settled: Callable[[int], bool],
    ) -> None:
        """Have an inquiry answered where it has blocks enough for several processes."""
        launch, path = for_blocks(self.launch, inquiry.blocks), (folder / GATE_JOB).absolute()
        shape = shape_of(launch)
        if shape.world == 1:
            return
        shutil.rmtree(path.parent / FOLDER, ignore_errors=True)
        (path.parent / FOLDER).mkdir(parents=True)
        _write(path, inquiry, requests, launch, shape.world)
        if launch.kind is Launcher.slurm:
            slurm.check_shared(launch, path)
        progress.note(f"{shape.world} processes ask {inquiry.blocks:,} blocks of documents")
        hearing = _Hearing(inquiry=inquiry, world=shape.world, progress=progress, is_settled=is_settled)
        watch = Watch(launch=launch, shape=shape, path=path, show=hearing.hear, enough=lambda: hearing.settled)
        watch.run()
        for line in hearing.tally.notes():
            progress.note(line)
        if not hearing.settled:
            figures(watch, progress.note)
        shutil.rmtree(path.parent / FOLDER)
        path.unlink()


@dataclass(kw_only=True)
class _Hearing:
    """Reports of all processes, taken together."""

    inquiry: Inquiry
    world: int
    progress: GateProgress
    is_settled: Callable[[int], bool]
    settled: bool = False
    _looked: dict[int, set[int]] = field(default_factory=dict)
    """Processes that have asked their share, by look."""

    def __post_init__(self) -> None:
        self.tally = Tally(self.inquiry, self.progress.advance)

    def hear(self, signs: Signs) -> None:
        """Take what the processes have told since the last call."""
        for rank, name, *values in signs.events():
            if name == "answered":
                self.tally.answered(rank, *values)
            elif name == "cut":
                self.tally.cut(*values)
            elif name == "looked":
                self._look(rank, *values)

    def _look(self, rank: int, look: int) -> None:
        self._looked.setdefault(look, set()).add(rank)
        later = any(part.look > look for part in self.inquiry.parts)
        if later and not self.settled and len(self._looked[look]) == self.world:
            self.settled = self.is_settled(look)


def gate_group(launch: LaunchConfig) -> GateGroup | None:
    """Return the processes for the gates of a launch; None when the command asks alone."""
    return None if shape_of(launch).world == 1 else GateGroup(launch=launch)


def _write(
    path: Path, inquiry: Inquiry, requests: Iterable[tuple[Place, Sequence[Any]]], launch: LaunchConfig, world: int
) -> None:
    """Write the job to ``path``, and its requests into the folder beside it."""
    digest, file = sha256(), path.parent / FOLDER / REQUESTS
    with naming(file), file.open("wb") as stream:
        for place, values in requests:
            line = json.dumps([*place, values]).encode() + b"\n"
            digest.update(line)
            stream.write(line)
    job = GateJob(
        versions=_versions(), systems={name: as_json(plain(source)) for name, source in inquiry.systems.items()},
        dtype=inquiry.dtype, device=inquiry.device, seed=inquiry.seed, size=inquiry.size,
        cache=str(inquiry.cache.absolute()), parts=inquiry.parts, world=world, requests=digest.hexdigest(),
        silence_seconds=launch.silence_seconds, command=os.getpid() if launch.kind is Launcher.local else None,
    )  # fmt: skip
    write_synced(path, json.dumps(plain(job), indent=2))


def read_gate_job(path: Path) -> GateJob:
    """Return the job of a gate in a file.

    Raises BadInput for processes of other versions than the command's, ArtifactDamaged for a torn file.
    """
    return as_kind(GateJob, read_checked(path, _versions()), str(path))


def read_requests(path: Path, digest: str, places: Collection[Place]) -> dict[Place, Sequence[Any]]:
    """Return the requests' values of some blocks. Raises ArtifactDamaged when the file is not the command's."""
    found, kept = sha256(), {}
    with path.open("rb") as stream:
        for line in stream:
            found.update(line)
            *place, values = json.loads(line)
            if tuple(place) in places:
                kept[tuple(place)] = values
    if found.hexdigest() != digest:
        raise ArtifactDamaged(f"{path} is damaged: its SHA-256 is not the one in {GATE_JOB}")
    return kept


def _versions() -> dict[str, str]:
    from posttrain.scoring.fingerprint import library_versions

    return library_versions() | versions()
