"""The catalogue: the artifacts that a server is given, verified, with what their gates said of them.

Nothing here loads a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.artifact import MANIFEST, Artifact, ModelSource, artifacts_near, verify
from posttrain.config.schema import ModelConfig
from posttrain.errors import ArtifactDamaged, BadInput, PosttrainError, Problem, first_line, reject, suggest
from posttrain.model.base import resolve_base
from posttrain.run.start import find_standing

ROOT = Path("runs")
FLAG = "--allow-unpromoted"


@dataclass(frozen=True, kw_only=True)
class BasePlace:
    """The place of a base that has moved since the training."""

    path: str | None = None
    """Folder or hub name; None is where it was."""
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model to be served."""

    name: str
    """Stage and digest, or ``base``, for messages."""
    digest: str
    """Its name for users."""
    source: ModelSource
    base: ModelSource
    """The base under it."""
    dtype: str
    """Number format of its weights."""
    doubt: str | None = None
    """Reason for which it is not promoted; None when it is, or is a base."""


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The models of a server."""

    artifacts: tuple[Served, ...]
    """By lineage, the oldest first: v1, v2 and so on."""
    bases: tuple[Served, ...]
    """Every base under them, that of the first artifact first."""
    root: Path
    """Output root with the ledger and the aliases."""
    skipped: tuple[str, ...] = ()
    """Artifacts that are left out, each with the reason."""

    def without(self, faults: Mapping[str, PosttrainError]) -> Catalogue:
        """Return the catalogue without the artifacts of these digests, each of which has the reason given.

        Raises as ``read_catalogue`` does when none is left.
        """
        left = tuple(served for served in self.artifacts if served.digest not in faults)
        if not left:
            raise _all_faults(list(faults.values()))
        kept = {served.base.digest for served in left}
        bases = tuple(base for base in self.bases if base.digest in kept)
        return replace(self, artifacts=left, bases=bases, skipped=(*self.skipped, *map(first_line, faults.values())))


def read_catalogue(
    words: Sequence[str], place: BasePlace, root: Path | None = None, *, unpromoted: bool = False
) -> Catalogue:
    """Read the runs and artifacts in ``words``; with ``unpromoted`` also those that no gate passed.

    What is damaged, not promoted or without its base is left out, with the reason, as long as something else is served.

    Raises BadInput for a path that holds neither a run nor an artifact. When nothing is left, raises ArtifactDamaged if
    something is damaged, else BadInput.
    """
    found: dict[str, Served] = {}
    faults: list[PosttrainError] = []
    paths = [path for word in words for path in _paths(word)]
    for path in paths:
        try:
            served = _read(path, place, root or _root(path), unpromoted=unpromoted)
            found.setdefault(served.digest, served)
        except (ArtifactDamaged, BadInput) as error:
            faults.append(error)
    if not found:
        raise _all_faults(faults)
    served_all = tuple(_by_lineage(found.values()))
    bases = {each.base.digest: base_of(each) for each in served_all}
    skipped = tuple(first_line(error) for error in faults)
    return Catalogue(artifacts=served_all, bases=tuple(bases.values()), root=root or _root(paths[0]), skipped=skipped)


def _all_faults(faults: Sequence[PosttrainError]) -> PosttrainError:
    """Return one error for several: ArtifactDamaged if something is damaged, else BadInput."""
    damaged = [str(error) for error in faults if isinstance(error, ArtifactDamaged)]
    if damaged:
        return ArtifactDamaged("; ".join(damaged))
    return BadInput([problem for error in faults if isinstance(error, BadInput) for problem in error.problems])


def _read(path: Path, place: BasePlace, root: Path, *, unpromoted: bool) -> Served:
    """Return the artifact in a folder. Raises BadInput when no gate passed it, unless ``unpromoted`` are served too."""
    artifact = verify(path)
    doubt = find_standing(artifact, root).doubt
    if doubt is not None and not unpromoted:
        reject(str(path), f"the artifact {artifact.named} {doubt}", f"Serve a promoted one, or give {FLAG}")
    return read_served(artifact, place, doubt)


def read_served(artifact: Artifact, place: BasePlace, doubt: str | None) -> Served:
    """Return a verified artifact with its base. Raises BadInput when the base is gone, ArtifactDamaged for another."""
    manifest = artifact.manifest
    config = ModelConfig(path=place.path or manifest.base.name, revision=place.revision)
    try:
        base = resolve_base(config, artifact.pins)
    except BadInput as error:
        fix = "Give the base's present place: model.path=DIR or a hub name"
        trained = Problem(where=str(artifact.path), what=f"was trained on {manifest.base.name}", fix=fix)
        raise BadInput([*error.problems, trained]) from None
    return Served(
        name=artifact.named, digest=artifact.digest, source=artifact.source(base), base=base, dtype=manifest.dtype,
        doubt=doubt,
    )  # fmt: skip


def base_of(served: Served) -> Served:
    """Return the base under a model, to be asked beside it."""
    base = served.base
    return Served(name=f"base {base.digest[:12]}", digest=base.digest, source=base, base=base, dtype=served.dtype)


def _paths(word: str) -> list[Path]:
    """Return the artifact in a folder, or those of a run in the order of its stages."""
    for path in (Path(word), ROOT / word):
        if os.path.lexists(path / MANIFEST):
            return [path.resolve()]
        if os.path.lexists(path / "run.json"):
            stages = sorted((path / "stages").glob("*/artifact"), key=lambda each: each.parent.name)
            found = [each.resolve() for each in stages if os.path.lexists(each / MANIFEST)]
            if not found:
                reject(str(path), "the run has published no artifact", "The same command that began it resumes it")
            return found
    names = [path.parent.name for path in ROOT.glob("*/run.json")]
    reject(word, "is neither a run nor an artifact", suggest(word, names) if names else artifacts_near(Path(word)))


def _root(artifact: Path) -> Path:
    """Return the output root of an artifact in a run, and ./runs for any other."""
    parents = artifact.parents
    return parents[3] if len(parents) > 3 and parents[1].name == "stages" else ROOT


def _by_lineage(found: Iterable[Served]) -> list[Served]:
    """Sort by the number of stages; runs that were given first come first."""
    return sorted(found, key=lambda served: len(served.source.lineage))
