"""``posttrain merge``: an adapter and its base as one model of full weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from posttrain import environment
from posttrain.artifact import MANIFEST, Artifact, ModelSource, artifacts_near, verify
from posttrain.commands.arguments import parse
from posttrain.config.regression import BaseSettings
from posttrain.config.schema import ModelConfig
from posttrain.errors import reject
from posttrain.model.base import resolve_base

if TYPE_CHECKING:
    from posttrain.model.merging import Distances

USAGE = "posttrain merge ADAPTER_DIR OUTPUT_DIR [model.path=BASE] [model.revision=COMMIT]"
KEYS = ("model.path", "model.revision")
"""Settings for a base that has moved since the training."""


def main(words: list[str]) -> int:
    """Merge an adapter into its base, prove that the logits are the same, and publish the result."""
    given = parse("merge", words, KEYS)
    if len(given.plain) != 2:
        reject(" ".join(["merge", *words]), "needs two directories", USAGE)
    path, output = Path(given.plain[0]), Path(given.plain[1])
    if not path.is_dir():
        reject(str(path), "there is no such directory", artifacts_near(path))
    if output.exists():
        reject(str(output), "exists already", "Give a directory that does not exist")
    if os.path.lexists(path / MANIFEST):
        return _merge_artifact(path, output, given.settings)
    return _merge_foreign(path, output, given.settings)


def base_notes(artifact: Artifact) -> list[str]:
    """Return the number format of the merged weights, and how they differ from the original base."""
    quantization, added = artifact.manifest.quantization, len(artifact.manifest.added_tokens)
    notes = [artifact.manifest.dtype]
    notes += [f"the base as quantised to {quantization}"] if quantization else []
    notes += [f"{added} added tokens"] if added else []
    return notes


def _merge_artifact(path: Path, output: Path, given: dict[str, str]) -> int:
    artifact = verify(path)
    if not artifact.is_adapter:
        _reject_whole(path)
    base = _base(artifact, given)
    environment.prepare()
    with environment.importing():
        from posttrain.model.merging import merge
        from posttrain.run.start import find_standing

    doubt = find_standing(artifact, Path("runs")).doubt
    merged = merge(artifact, base, output, doubt)
    if doubt is not None:
        print(f"warning    {artifact.named} {doubt}")
    print(f"merged     {artifact.path} into {base.base}: {', '.join(base_notes(artifact))}")
    _show(merged.distances)
    print(f"published  {merged.artifact.path} {merged.artifact.digest[:12]}")
    return 0


def _merge_foreign(path: Path, output: Path, given: dict[str, str]) -> int:
    """Merge a peft adapter of another tool, found and loaded as ``posttrain gate`` does."""
    from posttrain.regression.candidate import read_candidate

    place = BaseSettings(path=given.get("model.path"), revision=given.get("model.revision"))
    if (path / "config.json").is_file() and not (path / "adapter_config.json").exists():
        _reject_whole(path)
    candidate = read_candidate(path, place)
    environment.prepare()
    from posttrain.model.merging import merge_foreign

    distances = merge_foreign(candidate.source, candidate.base, candidate.dtype, output)
    print(f"merged     {candidate.path} into {candidate.base.base}: {candidate.dtype}")
    _show(distances)
    print(f"written    {output}, without a manifest: the adapter is another tool's, and no gate of a run judged it")
    return 0


def _show(distances: Distances) -> None:
    from posttrain.model.merging import EXACT

    print(f"sum        differs by {distances.exact:.1e} of the logits' spread in float32 (limit {EXACT:.0e})")
    print(f"weights    differ by {distances.published:.1e} as published (limit {distances.limit:.0e})")


def _reject_whole(path: Path) -> NoReturn:
    reject(str(path), "holds full weights, with nothing to merge", "Use it as it is")


def _base(artifact: Artifact, given: dict[str, str]) -> ModelSource:
    """Return the base of the adapter, from where it was in training unless a setting names another place."""
    path = given.get("model.path", artifact.manifest.base.name)
    return resolve_base(ModelConfig(path=path, revision=given.get("model.revision")), artifact.pins)
