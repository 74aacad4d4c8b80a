"""Processes that answer the questions of an on-policy source, block by block, and their job: ``sampling.json``.

Each writes whole blocks to the place where the command would keep them: answers do not depend on who writes them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.disk import naming, write_synced
from posttrain.errors import ArtifactDamaged
from posttrain.launch import slurm
from posttrain.launch.group import Watch, figures
from posttrain.launch.job import FOLDER, REQUESTS, SAMPLING_JOB, as_json, read_checked, source_of, versions
from posttrain.launch.shape import for_blocks, shape_of
from posttrain.launch.signs import RankAnswers, Signs
from posttrain.sampling.answers import Asking, Blocks, computing, write_blocks, writing
from posttrain.sampling.sampler import Drawing
from posttrain.saved import as_kind, plain, read_text


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """Questions to be answered as the processes get them."""

    versions: Mapping[str, str]
    """Versions of all that answers depend on; processes with others are rejected."""
    source: Mapping[str, Any]
    """The model that answers."""
    dtype: str
    drawing: Mapping[str, Any]
    folder: str
    """Folder of the blocks."""
    size: int
    """Questions of a block."""
    missing: tuple[int, ...]
    """Numbers of the blocks to be written."""
    world: int
    """Number of processes."""
    prompts: str
    """SHA-256 of the prompts' file."""
    silence_seconds: float
    """Seconds without a sign of life after which a process counts as hanging."""
    command: int | None
    """Process of the command, from which all of these descend; None where others start them."""

    def share(self, rank: int) -> list[int]:
        """Return the blocks that process ``rank`` writes: every n-th of all."""
        return list(self.missing[rank :: self.world])


@dataclass(frozen=True, kw_only=True)
class SamplingGroup:
    """Several processes for the answers to the questions of a stage."""

    launch: LaunchConfig
    folder: Path
    """The stage's folder."""
    note: Callable[[str], None]
    """Shows a line to the user."""

    def __call__(self, blocks: Blocks, missing: Sequence[int], asking: Asking, wrote: Callable[[int], None]) -> None:
        """Have missing blocks written where there are enough for several processes; ``wrote`` gets their answers.

        Raises what one process would; one that died or hangs is a PosttrainError.
        """
        launch, path = for_blocks(self.launch, len(missing)), (self.folder / SAMPLING_JOB).absolute()
        shape = shape_of(launch)
        if shape.world == 1:
            return
        shutil.rmtree(path.parent / FOLDER, ignore_errors=True)
        (path.parent / FOLDER).mkdir(parents=True)
        _write(path, blocks, missing, asking, launch, shape.world)
        if launch.kind is Launcher.slurm:
            slurm.check_shared(launch, path)
        self.note(f"{shape.world} processes answer {len(missing):,} blocks of questions")

        def hear(signs: Signs) -> None:
            for _, name, *values in signs.events():
                if name == "answered":
                    wrote(values[1])

        watch = Watch(launch=launch, shape=shape, path=path, show=hear, stop_requested=asking.stop_requested)
        watch.run()
        figures(watch, self.note)
        shutil.rmtree(path.parent / FOLDER)
        path.unlink()


def sampling_group(launch: LaunchConfig, folder: Path, note: Callable[[str], None]) -> SamplingGroup | None:
    """Return the processes for the questions of a stage; None when the command asks alone."""
    return None if shape_of(launch).world == 1 else SamplingGroup(launch=launch, folder=folder, note=note)


def _write(
    path: Path, blocks: Blocks, missing: Sequence[int], asking: Asking, launch: LaunchConfig, world: int
) -> None:
    """Write the job to ``path``, and the prompts into the folder beside it."""
    text, file = json.dumps([list(ids) for ids in blocks.prompts]), path.parent / FOLDER / REQUESTS
    with naming(file):
        file.write_text(text, encoding="utf-8")
    job = SamplingJob(
        versions=computing() | versions(), source=as_json(plain(asking.source)), dtype=asking.dtype,
        drawing=asdict(asking.drawing), folder=str(blocks.folder.absolute()), size=blocks.size, missing=tuple(missing),
        world=world, prompts=sha256(text.encode()).hexdigest(), silence_seconds=launch.silence_seconds,
        command=os.getpid() if launch.kind is Launcher.local else None,
    )  # fmt: skip
    write_synced(path, json.dumps(plain(job), indent=2))


def read_sampling_job(path: Path) -> SamplingJob:
    """Return the job in a file.

    Raises BadInput for processes of other versions than the command's, ArtifactDamaged for a torn file.
    """
    return as_kind(SamplingJob, read_checked(path, computing() | versions()), str(path))


def answer_share(path: Path, job: SamplingJob, rank: int, stop_requested: Callable[[], bool]) -> None:
    """Write the blocks of process ``rank``. Raises Interrupted when a stop is requested: whole blocks are kept."""
    from posttrain.model.loading import load_tokenizer

    progress, file = RankAnswers(path.parent / FOLDER, rank), path.parent / FOLDER / REQUESTS
    text = read_text(file)
    if sha256(text.encode()).hexdigest() != job.prompts:
        raise ArtifactDamaged(f"{file} is damaged: its SHA-256 is not the one in {path.name}")
    blocks = Blocks(folder=Path(job.folder), prompts=json.loads(text), size=job.size)
    source = source_of(job.source)
    asking = Asking(
        source=source, base=source, dtype=job.dtype, drawing=Drawing(**job.drawing), kept=blocks.folder.parent,
        part=lambda done, total, what: progress.live(), stop_requested=stop_requested,
    )  # fmt: skip
    tokenizer = load_tokenizer(source)
    with writing(asking, tokenizer) as write:
        write_blocks(blocks, job.share(rank), write, tokenizer, asking, lambda count: progress.answered(0, count))
