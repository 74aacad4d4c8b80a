"""Artifacts that a stage need not make again: its own, those it replaced, and those of other runs below the same root.

    stages/<name>/artifact                what the present recipe gives
    stages/<name>/artifact.<digest>       replaced, never deleted; found again by its fingerprint
    stages/<name>/evidence.<digest>/      its verdict, scores and curves; or those of another gate about ``artifact``

One is found by the fingerprint in its manifest, which costs a look at every manifest and no hash; that one is then
verified, byte by byte. From another run its files are linked: either run can be deleted without the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.artifact import MANIFEST, Artifact, ModelSource, verify
from posttrain.disk import sync
from posttrain.errors import ArtifactDamaged
from posttrain.run.job import Job
from posttrain.run.metrics import MetricsLog
from posttrain.run.verdict import SCORECARD, VERDICT, read_verdict
from posttrain.saved import as_kind, lines_of, read_json, read_text

ARTIFACT = "artifact"
DRAFT = ".draft"
EVIDENCE = (VERDICT, SCORECARD, "questions.jsonl")
"""Files of a stage about its present artifact."""
CURVES = "metrics.jsonl"
ORIGIN = "origin"
"""File of what was set aside: the place it was linked from, empty when the run trained it."""


def find_published(job: Job, parent: ModelSource, fingerprint: str) -> Artifact | None:
    """Return the stage's artifact when it was made before: here, or in any run below the output root.

    Sets an artifact of other settings or another parent aside. Raises ArtifactDamaged when the stage's own does not
    match its manifest, or holds unsound weights: it is never silently trained again.
    """
    from posttrain.model.checks import check_output

    path = job.folder / ARTIFACT
    if path.exists():
        artifact = verify(path)
        if artifact.manifest.fingerprint == fingerprint:
            check_output(path, parent)  # its manifest may have been written again
            job.display.line(job.name, "train", f"already done: {artifact.digest[:12]}")
            return artifact
        searches = job.step.replay is not None and job.step.replay.auto is not None
        reason = "another share of replay" if searches else "another parent, or other versions"
        set_aside(job, artifact.digest, reason)
    shutil.rmtree(job.folder / DRAFT, ignore_errors=True)  # half of the output of a killed attempt
    for found in _with_fingerprint(job, fingerprint):
        with _skipping_damaged(job, found):
            return _restore(job, parent, found) if found.parent == job.folder else _Linked(job, found).take(parent)
    return None


def withdraw(job: Job, reason: str) -> None:
    """Set the stage's artifact aside, if it has one, and make the stage pending: the present recipe does not reach it.

    A damaged one is set aside, too.
    """
    path = job.folder / ARTIFACT
    if path.exists():
        try:
            digest = _manifest_of(path)["digest"]
        except ArtifactDamaged:
            digest = "damaged"
        set_aside(job, digest, reason)
    job.entry.reset()


def set_aside(job: Job, digest: str, reason: str) -> None:
    """Rename the stage's artifact by its digest, with its verdict, scores and curves, and say so."""
    name = _free_name(job.folder, digest[:12])
    evidence = job.folder / f"evidence.{name}"
    evidence.mkdir(exist_ok=True)
    log = MetricsLog(job.run.path / CURVES, job.name)
    # The artifact is renamed last: until then the stage still has it, and a kill in between costs at most a look at
    # its cached scores.
    (evidence / CURVES).write_text("".join(f"{line}\n" for line in log.lines()), encoding="utf-8")
    (evidence / ORIGIN).write_text(job.entry.origin or "", encoding="utf-8")
    for file in EVIDENCE:
        with contextlib.suppress(FileNotFoundError):
            (job.folder / file).replace(evidence / file)
    (job.folder / ARTIFACT).rename(job.folder / f"{ARTIFACT}.{name}")
    sync(job.folder)
    log.replace([])
    job.entry.origin = None
    job.display.line(job.name, "train", f"replaced: {digest[:12]}, kept as {ARTIFACT}.{name} ({reason})")


def keep_evidence(job: Job) -> None:
    """Keep a verdict by another gate about the stage's artifact, with its scores, before it is judged anew."""
    if not (job.folder / VERDICT).exists():
        return
    former = read_verdict(job.folder / VERDICT)
    evidence = job.folder / f"evidence.{former.gate_digest[:12]}"
    evidence.mkdir(exist_ok=True)
    for file in reversed(EVIDENCE):  # the verdict last: there is none without its scores
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(job.folder / file, evidence / file)
    what = f"judged anew by other settings: the former verdict, {former.verdict.state}, is kept in {evidence.name}"
    job.display.line(job.name, "gate", what)


def _free_name(folder: Path, name: str) -> str:
    """Return ``name``, with a number where an artifact of this name was set aside before."""
    names = [name, *(f"{name}.{number}" for number in range(2, 1000))]
    return next(each for each in names if not (folder / f"{ARTIFACT}.{each}").exists())


def _restore(job: Job, parent: ModelSource, found: Path) -> Artifact:
    """Bring back an artifact that this stage has set aside, with its verdict, scores and curves."""
    from posttrain.model.checks import check_output

    artifact = verify(found)
    check_output(found, parent)
    evidence = found.with_name(found.name.replace(ARTIFACT, "evidence", 1))
    MetricsLog(job.run.path / CURVES, job.name).replace(_lines(evidence / CURVES))
    for file in EVIDENCE:
        with contextlib.suppress(FileNotFoundError):
            (evidence / file).replace(job.folder / file)
    job.entry.origin = next(iter(_lines(evidence / ORIGIN)), None)
    path = found.rename(job.folder / ARTIFACT)
    sync(job.folder)
    shutil.rmtree(evidence, ignore_errors=True)
    job.display.line(job.name, "train", f"brought back: {artifact.digest[:12]}, which this run had replaced")
    return Artifact(path, artifact.manifest, artifact.digest)


@dataclass(frozen=True)
class _Linked:
    """An artifact of another stage or run, linked into this stage."""

    job: Job
    found: Path

    def take(self, parent: ModelSource) -> Artifact:
        """Link it whole or not at all; raise ArtifactDamaged unless it is what this stage would have made."""
        from posttrain.model.checks import check_output

        job, draft = self.job, self.job.folder / DRAFT
        _link(self.found, draft)
        artifact = verify(draft)
        self._require_same_origin(artifact, parent)
        check_output(draft, parent)
        MetricsLog(job.run.path / CURVES, job.name).replace(self._curves())
        job.entry.origin = str(self.found.relative_to(job.plan.output_root))
        job.run.save()  # before it has its name: after a kill in between, the run does not claim to have trained it
        path = draft.rename(job.folder / ARTIFACT)
        sync(job.folder)
        job.display.line(
            job.name, "train", f"linked from {job.entry.origin}: {artifact.digest[:12]}, not trained again"
        )
        return Artifact(path, artifact.manifest, artifact.digest)

    def _require_same_origin(self, artifact: Artifact, parent: ModelSource) -> None:
        """Raise ArtifactDamaged when the manifest contradicts its fingerprint, as only a forged one does."""
        manifest, job = artifact.manifest, self.job
        wanted = {
            "kind": job.step.stage.name,
            "base": job.base.model_digest,
            "parent_digest": parent.digest,
            "lineage": (*parent.lineage, job.step.stage.name),
            "data_digest": job.data_digest,
            "chat_template": parent.chat_template,
        }
        claimed = {name: getattr(manifest, name) for name in wanted} | {"base": manifest.base.digest}
        if differing := [name for name, value in wanted.items() if claimed[name] != value]:
            raise ArtifactDamaged(f"{self.found / MANIFEST} contradicts its fingerprint: another {differing[0]}")

    def _curves(self) -> list[str]:
        """Return the logged steps of its training, under the name of this stage."""
        stage = self.found.parent
        if self.found.name == ARTIFACT:
            lines = MetricsLog(stage.parents[1] / CURVES, stage.name).lines()
        else:
            lines = _lines(stage / self.found.name.replace(ARTIFACT, "evidence", 1) / CURVES)
        return [json.dumps({**json.loads(line), "stage": self.job.name}) for line in lines]


def _with_fingerprint(job: Job, fingerprint: str) -> Iterator[Path]:
    """Yield every published folder with this fingerprint: first the stage's own, then those of this and other runs."""
    root = job.plan.output_root
    own = sorted(job.folder.glob(f"{ARTIFACT}.*"))
    others = [path for path in sorted(root.glob(f"*/stages/*/{ARTIFACT}*")) if path.parent != job.folder]
    for path in (*own, *others):
        try:
            if _manifest_of(path)["fingerprint"] == fingerprint:
                yield path
        except ArtifactDamaged:  # of which stage it was cannot be told
            continue


def _manifest_of(folder: Path) -> dict[str, str]:
    """Return the texts of a manifest, unverified; raise ArtifactDamaged when it cannot be read."""
    path = folder / MANIFEST
    try:
        values = as_kind(dict[str, Any], read_json(path), str(path))
        return {"digest": str(values["digest"]), "fingerprint": str(values["fingerprint"])}
    except (OSError, KeyError) as error:
        raise ArtifactDamaged(f"{path} cannot be read: {error}") from None


@contextlib.contextmanager
def _skipping_damaged(job: Job, found: Path) -> Iterator[None]:
    """Say that a damaged artifact is not used, and remove what was linked of it; so too for one that disappeared."""
    try:
        yield
    except (ArtifactDamaged, FileNotFoundError) as error:
        shutil.rmtree(job.folder / DRAFT, ignore_errors=True)
        job.display.line(job.name, "train", f"{found} is not used: {error}")


def _link(found: Path, draft: Path) -> None:
    """Link every file of ``found`` into the new folder ``draft``; copy it where links are impossible."""
    for path in sorted(found.rglob("*")):
        if path.is_symlink() or not path.is_file():  # an artifact has none, and ``verify`` misses what it should have
            continue
        place = draft / path.relative_to(found)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except FileNotFoundError:
            raise
        except OSError:  # another disk, a file system without links, too many links
            shutil.copyfile(path, place)
            sync(place)
    for folder in sorted({path.parent for path in draft.rglob("*")} | {draft}):
        sync(folder)


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; none when it is missing."""
    try:
        return lines_of(read_text(path, errors="replace"))
    except FileNotFoundError:
        return []
