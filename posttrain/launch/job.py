"""The job of processes: that of a stage with its records, of a gate with its requests, of questions with their prompts.

The command writes them, each process reads them. They compose no recipe and load no task: what the command read,
filtered and verified is what they train on, what it asks is what they ask. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from posttrain.artifact import ModelSource
from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.config.schema import GateTask
from posttrain.context import StageContext
from posttrain.data.held import HeldRecords, digest_records, release
from posttrain.data.records import Conversation, Feedback, Origin, Preference, Question, Record, Text
from posttrain.disk import naming, write_synced
from posttrain.errors import ArtifactDamaged, PluginFailed, reject
from posttrain.host import consent
from posttrain.saved import as_kind, plain, read_json
from posttrain.stage import Stage
from posttrain.version import __version__

JOB = "job.json"
GATE_JOB = "gate.json"
SAMPLING_JOB = "sampling.json"
FOLDER = "launch"
"""Folder beside it: records, signs of life, outcomes, the launcher's log."""
RECORDS = "records.jsonl"
EVAL_RECORDS = "eval_records.jsonl"
REQUESTS = "requests.jsonl"
STOP = "stop"
"""File in that folder that asks the processes to stop, where no signal reaches them."""
KINDS = {kind.__name__: kind for kind in (Conversation, Text, Preference, Feedback, Question)}
PATHS = ("model", "adapter", "tokenizer")
"""Fields of a ModelSource that are paths."""


@dataclass(frozen=True, kw_only=True)
class RecordsFile:
    """Number and digest of the records in a file, by which the store of rendered rows has them without a reading."""

    name: str
    """Name of the file in FOLDER."""
    sha256: str
    """SHA-256 of the file."""
    count: int
    """Number of records."""
    digest: str
    """Digest of the records."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage as its processes get it."""

    versions: Mapping[str, str]
    """Versions of posttrain, Python and torch; processes with others are rejected."""
    name: str
    """Name of the stage's node in the recipe."""
    kind: str
    """Kind of the stage."""
    origin: str
    """Plugin of the stage, with its version."""
    config: Mapping[str, Any]
    """Settings of the stage, whole: a checkpoint of other settings is not resumed."""
    parent: Mapping[str, Any]
    """The model to start from."""
    seed: int
    dtype: str
    engine: str
    world: int
    """Number of processes."""
    records: RecordsFile
    """The records to train on."""
    eval_records: RecordsFile
    """The records of the eval loss."""
    checkpoints: str
    output: str
    kept: str | None
    """Folder for what can be computed again."""
    trail: str | None
    """Folder for the answers that the stage samples."""
    data_workers: int | None
    """Processes that render records."""
    clusters: Mapping[str, int]
    """Number of the cluster of records alike, by their places."""
    gate_tasks: Mapping[str, GateTask]
    """Tasks of the stage's gate to be followed while answers are sampled."""
    consent: Sequence[str]
    """Words by which the command line allows the code of their files, which no recipe can."""
    metrics: Mapping[str, Any]
    """Figures that the command has for the manifest."""
    silence_seconds: float
    """Longest wait of a process for the others."""
    command: int | None
    """Process of the command, from which all of these descend; None where others start them."""


def versions() -> dict[str, str]:
    """Return the versions that all processes of a launch share with the command."""
    return {"posttrain": __version__, "Python": platform.python_version(), "torch": version("torch")}


def write_job(
    path: Path, stage: Stage, context: StageContext, *, origin: str, world: int, launch: LaunchConfig
) -> None:
    """Write the job of a stage to ``path``, and its records into the folder beside it."""
    records = _write_records(path.parent / FOLDER / RECORDS, context.records, context.name)
    eval_records = _write_records(path.parent / FOLDER / EVAL_RECORDS, context.eval_records, context.name)
    job = Job(
        versions=versions(),
        name=context.name,
        kind=stage.name,
        origin=origin,
        config=_settings(context.config),
        parent=as_json(plain(context.parent)),
        seed=context.seed,
        dtype=context.dtype,
        engine=context.engine,
        world=world,
        records=records,
        eval_records=eval_records,
        checkpoints=str(context.checkpoints.absolute()),
        output=str(context.output.absolute()),
        kept=str(context.kept.absolute()) if context.kept else None,
        trail=str(context.trail.absolute()) if context.trail else None,
        data_workers=context.data_workers,
        clusters=dict(context.clusters),
        gate_tasks=context.gate_tasks,
        consent=consent.words(),
        metrics=context.metrics,
        silence_seconds=launch.silence_seconds,
        command=os.getpid() if launch.kind is Launcher.local else None,
    )
    write_synced(path, json.dumps(plain(job), indent=2))


def read_job(path: Path) -> Job:
    """Return the job of a stage in a file.

    Raises BadInput for processes of other versions than the command's, ArtifactDamaged for a torn file.
    """
    return as_kind(Job, read_checked(path, versions()), str(path))


def read_checked(path: Path, own: Mapping[str, str]) -> Any:
    """Return the values of a job. Raises BadInput when this process has other versions than the command."""
    values = read_json(path)
    given = values.get("versions") if isinstance(values, dict) else None
    if isinstance(given, dict) and given != own:
        found = ", ".join(f"{name} {found}" for name, found in own.items() if given.get(name) != found)
        wanted = ", ".join(f"{name} {each}" for name, each in given.items() if own.get(name) != each)
        fix = "Install the same versions on every node, or give every node the same environment"
        reject(str(path), f"a process on {os.uname().nodename} has {found}, but the command {wanted}", fix)
    return values


def config_of(job: Job, stage: Stage) -> Any:
    """Return the typed settings of the stage."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(stage.config), OmegaConf.create(dict(job.config))))


def parent_of(job: Job) -> ModelSource:
    """Return the model to start from."""
    return source_of(job.parent)


def source_of(values: Mapping[str, Any]) -> ModelSource:
    """Return a model's source from its JSON values."""
    given = dict(values) | {name: Path(values[name]) for name in PATHS if values[name] is not None}
    made: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in given.items()}
    return ModelSource(**made)


def read_records(folder: Path, file: RecordsFile) -> HeldRecords:
    """Return the records of a file in ``folder``, which is read when they are asked for, not before.

    Reading raises ArtifactDamaged when the file is not the command's.
    """
    return HeldRecords(partial(_read_file, folder / file.name, file.sha256), count=file.count, digest=file.digest)


def _read_file(path: Path, digest: str) -> list[Record]:
    found = sha256()
    records: list[Record] = []
    with path.open("rb") as stream:
        for line in stream:
            found.update(line)
            records.append(_record(*json.loads(line)))
    if found.hexdigest() != digest:
        raise ArtifactDamaged(f"{path} is damaged: its SHA-256 is not the one in {JOB}")
    return records


def _record(kind: str, values: dict[str, Any]) -> Record:
    made: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    if "origin" in made:
        made["origin"] = Origin(**made["origin"])
    make: Any = KINDS[kind]
    record: Record = make(**made)
    return record


def _write_records(path: Path, records: Sequence[Any], stage: str) -> RecordsFile:
    """Write records, and let them go."""
    digest = sha256()
    with naming(path), path.open("wb") as stream:
        for record in records:
            line = _line(record, stage)
            digest.update(line)
            stream.write(line)
    known = RecordsFile(
        name=path.name, sha256=digest.hexdigest(), count=len(records), digest=digest_records(records)
    )  # fmt: skip
    release(records)
    return known


def _line(record: Any, stage: str) -> bytes:
    kind = next(name for name, kind in KINDS.items() if isinstance(record, kind))
    values = {field.name: getattr(record, field.name) for field in fields(KINDS[kind])}
    if "origin" in values:
        values["origin"] = {field.name: getattr(record.origin, field.name) for field in fields(Origin)}
    try:
        line = json.dumps([kind, values])
        sound = _record(*json.loads(line)) == record
    except (TypeError, ValueError):
        sound = False
    if not sound:  # a tuple where JSON has a list, say: a template may print the two differently
        what = f"the record {record.where} of stage {stage!r} has values that JSON lacks"
        raise PluginFailed(f"{what}, so that several processes cannot be given it")
    return line.encode() + b"\n"


def _settings(config: Any) -> dict[str, Any]:
    return as_json(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def as_json(values: Any) -> dict[str, Any]:
    """Return values with their paths as texts."""
    return dict(json.loads(json.dumps(values, default=str)))
