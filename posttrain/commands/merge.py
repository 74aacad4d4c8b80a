"""``posttrain merge``: an adapter and its base as one model of full weights."""

from __future__ import annotations

from pathlib import Path

from posttrain import environment
from posttrain.artifact import Artifact, ModelSource, verify
from posttrain.commands.arguments import parse
from posttrain.config.schema import ModelConfig
from posttrain.errors import reject
from posttrain.model.base import resolve_base

USAGE = "posttrain merge ADAPTER_DIR OUTPUT_DIR [model.path=BASE] [model.revision=COMMIT]"
KEYS = ("model.path", "model.revision")
"""Settings for a base that has moved since the training."""


def main(words: list[str]) -> int:
    """Merge an adapter into its base, prove that the logits are the same, and publish the result."""
    given = parse("merge", words, KEYS)
    if len(given.plain) != 2:
        reject(" ".join(["merge", *words]), "needs two directories", USAGE)
    output = Path(given.plain[1])
    artifact = _adapter(Path(given.plain[0]))
    if output.exists():
        reject(str(output), "exists already", "Give a directory that does not exist")
    base = _base(artifact, given.settings)
    environment.prepare()
    from posttrain.model.merging import EXACT, merge
    from posttrain.run.start import find_standing

    doubt = find_standing(artifact, Path("runs")).doubt
    merged = merge(artifact, base, output, doubt)
    if doubt is not None:
        print(f"warning    {artifact.named} {doubt}")
    print(f"merged     {artifact.path} into {base.base}: {', '.join(base_notes(artifact))}")
    print(f"sum        differs by {merged.exact:.1e} of the logits' spread in float32 (limit {EXACT:.0e})")
    print(f"weights    differ by {merged.published:.1e} as published (limit {merged.limit:.0e})")
    print(f"published  {merged.artifact.path} {merged.artifact.digest[:12]}")
    return 0


def base_notes(artifact: Artifact) -> list[str]:
    """Return the number format of the merged weights, and how they differ from the original base."""
    quantization, added = artifact.manifest.quantization, len(artifact.manifest.added_tokens)
    notes = [artifact.manifest.dtype]
    notes += [f"the base as quantised to {quantization}"] if quantization else []
    notes += [f"{added} added tokens"] if added else []
    return notes


def _adapter(path: Path) -> Artifact:
    if not path.is_dir():
        fix = "Give the directory of a published adapter: runs/RUN/stages/STAGE/artifact"
        reject(str(path), "there is no such directory", fix)
    artifact = verify(path)
    if not artifact.is_adapter:
        reject(str(path), "holds full weights, with nothing to merge", "Use it as it is")
    return artifact


def _base(artifact: Artifact, given: dict[str, str]) -> ModelSource:
    """Return the base of the adapter, from where it was in training unless a setting names another place."""
    path = given.get("model.path", artifact.manifest.base.name)
    return resolve_base(ModelConfig(path=path, revision=given.get("model.revision")), artifact.pins)
