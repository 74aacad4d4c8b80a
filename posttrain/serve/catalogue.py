"""The catalogue: the artifacts that a server is given, verified, with what their gates said of them.

Nothing here loads a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.artifact import MANIFEST, Artifact, ModelSource, verify
from posttrain.config.schema import ModelConfig
from posttrain.errors import BadInput, Problem, reject, suggest
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
    """Number format of its arithmetic."""
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
    """Artifacts of the given runs that are left out, each with the reason."""


def read_catalogue(
    words: Sequence[str], place: BasePlace, root: Path | None = None, *, unpromoted: bool = False
) -> Catalogue:
    """Read the runs and artifacts in ``words``; with ``unpromoted`` also those that no gate passed.

    Raises BadInput for a path that holds neither, or when nothing promoted is left; ArtifactDamaged for a damaged one.
    """
    found: dict[str, Served] = {}
    skipped: list[str] = []
    for word in words:
        for path, named in _paths(word):
            artifact = verify(path)
            own_root = root or _root(path)
            doubt = find_standing(artifact, own_root).doubt
            if doubt is None or unpromoted:
                found.setdefault(artifact.digest, read_served(artifact, place, doubt))
            elif named:
                reject(str(path), f"the artifact {artifact.named} {doubt}", f"Serve a promoted one, or give {FLAG}")
            else:
                skipped.append(f"{artifact.named} {doubt}")
    if not found:
        why = "; ".join(skipped) or "none is given"
        raise BadInput(Problem(where=" ".join(words) or "serve", what=f"no promoted artifact: {why}", fix=f"Or {FLAG}"))
    served = tuple(_by_lineage(found.values()))
    bases = {each.base.digest: base_of(each) for each in served}
    first = next(path for word in words for path, _ in _paths(word))
    return Catalogue(artifacts=served, bases=tuple(bases.values()), root=root or _root(first), skipped=tuple(skipped))


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


def _paths(word: str) -> list[tuple[Path, bool]]:
    """Return the artifact in a folder, or those of a run in the order of its stages; True for one named itself."""
    for path in (Path(word), ROOT / word):
        if os.path.lexists(path / MANIFEST):
            return [(path.resolve(), True)]
        if os.path.lexists(path / "run.json"):
            stages = sorted((path / "stages").glob("*/artifact"), key=lambda each: each.parent.name)
            found = [(each.resolve(), False) for each in stages if os.path.lexists(each / MANIFEST)]
            if not found:
                reject(str(path), "the run has published no artifact", "The same command that began it resumes it")
            return found
    names = [path.parent.name for path in ROOT.glob("*/run.json")]
    reject(word, "is neither a run nor an artifact", suggest(word, names))


def _root(artifact: Path) -> Path:
    """Return the output root of an artifact in a run, and ./runs for any other."""
    parents = artifact.parents
    return parents[3] if len(parents) > 3 and parents[1].name == "stages" else ROOT


def _by_lineage(found: Iterable[Served]) -> list[Served]:
    """Sort by the number of stages; runs that were given first come first."""
    return sorted(found, key=lambda served: len(served.source.lineage))
