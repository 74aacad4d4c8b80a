"""Readings of records, remembered: a start that finds the digests of its files unchanged reads, parses and shapes none.

    <cache>/readings/<key>.json    number and digest of the records, the lines about them

The key covers all that a reading depends on: content and places of the files, options, seed, rows that preparation
keeps, template, code. Only files are remembered: where a plugin loads or shapes records, they are read at every start.
Who needs a remembered record reads all of them, and they must have the digest of the first reading.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from inspect import getfile, unwrap
from pathlib import Path
from typing import TYPE_CHECKING

import posttrain
from posttrain.data.held import HeldRecords
from posttrain.data.reading import places
from posttrain.digests import digest_of, file_digests
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged
from posttrain.host.plugins import CORE_ORIGIN, Host
from posttrain.plan import Step
from posttrain.prepare.kept import Kept
from posttrain.run.job import Job, records_digest, versions
from posttrain.run.train import Records, evaluation_of, preparer_of, read_records, show_preparation, taken
from posttrain.saved import plain, read_as
from posttrain.tokens.lengths import known_lengths

if TYPE_CHECKING:
    from pluggy import HookImpl

FOLDER = "readings"
LAYOUT = 1
"""Version of the files, part of every key."""
CODE = ("data", "run", "tokens", "chat_template.py")
"""Files of posttrain that decide what a reading finds, and what it says."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Records of one kind, without the records."""

    count: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The facts about a stage's records that reading and checking them gave."""

    key: str
    trained: Found
    evaluated: Found
    warnings: tuple[str, ...]
    """Lines about rows that cannot be read, and about keys that nothing reads."""
    proof: str = ""
    """Digest of all the others."""

    def signed(self) -> Reading:
        """Return the reading with its proof."""
        return replace(self, proof=digest_of(plain(replace(self, proof=""))))


def read_all(jobs: Sequence[Job]) -> dict[str, Records]:
    """Return the checked records of all stages, held for the first alone; raises BadInput as ``read_records`` does."""
    found: dict[str, Records] = {}
    for job in jobs:
        found[job.name] = _recall(job) or _read(job)
        if job is not jobs[0]:
            found[job.name].release()
    if len(jobs) > 1:
        gc.collect()  # what a hook answered may be held by a circle of its frames
    return found


def _read(job: Job) -> Records:
    """Read the records of a stage, and remember what is known of them."""
    records = read_records(job)
    if _is_remembered(job):
        trained, evaluated = (
            Found(count=len(held), digest=held.digest) for held in (records.trained, records.eval_records)
        )
        key = _key(job, records.kept)
        reading = Reading(key=key, trained=trained, evaluated=evaluated, warnings=tuple(records.warnings)).signed()
        path = _path(job, key)
        with contextlib.suppress(OSError):  # a disk that takes no file costs a reading at the next start, no more
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(plain(reading)))
    return records


def _recall(job: Job) -> Records | None:
    """Return the records of a stage as they were read before; None when they have to be read."""
    if not _is_remembered(job):
        return None
    preparer = replace(preparer_of(job), note=lambda line: None)  # a damaged one is named where it is made again
    done = preparer.find() if preparer.is_on else None
    lengths = None if done is None else known_lengths(done, job.plan.model)
    if preparer.is_on and (done is None or lengths is None):
        return None
    kept = "" if done is None else done.entry.kept
    reading = _find(job, _key(job, kept))
    if reading is None or records_digest(job.step) != job.data_digest:
        return None
    for line in reading.warnings:
        job.display.line(job.name, "data", f"warning: {line}")
    show_preparation(job, done)
    return Records(
        trained=_unread(job, job.step, reading.trained, done),
        eval_records=_unread(job, evaluation_of(job), reading.evaluated, None),
        warnings=reading.warnings,
        kept=kept,
        prepared=None if lengths is None else plain(lengths),
        done=done,
    )


def _unread(job: Job, step: Step, found: Found, done: Kept | None) -> HeldRecords:
    """Return records that are read when they are asked for."""
    where = f"{job.name}.{'data' if step is job.step else 'eval_data'}"
    return HeldRecords(lambda: taken(job, step, done), count=found.count, digest=found.digest, where=where)


def _is_remembered(job: Job) -> bool:
    """Return True where files alone decide about the records, and no check at the start has to see them."""
    readers = [job.host.plugins.get(each.plugin_name) for each in _readers(job.host)]
    alone = preparer_of(job).reads_files_alone and all(reader is not None and reader.is_ours for reader in readers)
    sources = (*job.step.sources, *job.step.eval_sources)
    sampled = job.step.config.rewarding() is not None or any(source.on_policy for source in sources)
    return alone and bool(sources) and not sampled


def _readers(host: Host) -> list[HookImpl]:
    return list(host.hook.load_records.get_hookimpls())


def _find(job: Job, key: str) -> Reading | None:
    """Return the reading under a key; a damaged one is as good as none."""
    try:
        found = read_as(Reading, _path(job, key))
    except (FileNotFoundError, ArtifactDamaged):
        return None
    return found if found.key == key and found == found.signed() else None


def _path(job: Job, key: str) -> Path:
    return job.plan.output_root / "cache" / FOLDER / f"{key}.json"


def _key(job: Job, kept: str) -> str:
    step = job.step
    weights = [source.weight for sources in (step.sources, step.eval_sources) for source in sources]
    return digest_of(
        {
            "layout": LAYOUT,
            "data": job.data_digest,
            "places": [places(sources, step.cache) for sources in (step.sources, step.eval_sources)],
            "shape": step.stage.records,
            "seed": step.seed if any(weight % 1 for weight in weights) else None,  # which draws parts of sources
            "max_bad_share": step.config.max_bad_share,
            # the plugin of a stage may check records by any of its settings
            "settings": None if step.origin == CORE_ORIGIN else plain(step.config),
            "prepared": step.config.prepare.enabled,
            "kept": kept,
            "base": job.base.digest,
            "code": _code_digest(*(getfile(unwrap(each.function)) for each in _readers(job.host))),
            "versions": {**versions(), "pyarrow": version("pyarrow")},
        }
    )


@cache
def _code_digest(*modules: str) -> str:
    """Return the digest of CODE, and of the files beside ``modules``."""
    root = Path(posttrain.__file__).parent
    found = [*(root / name for name in CODE), *(Path(module).parent for module in modules)]
    files = [path for each in found for path in (sorted(each.glob("*.py")) or [each])]
    return digest_of(list(file_digests({str(path): path for path in files}).values()))
