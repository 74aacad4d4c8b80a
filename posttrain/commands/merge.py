"""``posttrain merge``: standalone weights of an adapter and its base."""

from __future__ import annotations

from pathlib import Path

from posttrain import environment
from posttrain.artifact import Artifact, ModelSource, verify
from posttrain.config.schema import ModelConfig
from posttrain.errors import BadInput, Problem, suggest
from posttrain.model.base import resolve_base

USAGE = "posttrain merge ADAPTER_DIR OUTPUT_DIR [model.path=BASE] [model.revision=COMMIT]"
KEYS = ("model.path", "model.revision")
"""What may be said about the base: where it is now, if not where it was in training."""


def merge_command(words: list[str]) -> int:
    """Merge an adapter into its base, prove that the logits are the same, and publish the result."""
    folders = [word for word in words if "=" not in word]
    if len(folders) != 2:
        raise BadInput(Problem(where=" ".join(["merge", *words]), what="takes two directories", fix=USAGE))
    given = _given([word for word in words if "=" in word])
    output = Path(folders[1])
    artifact = _adapter(Path(folders[0]))
    if output.exists():
        raise BadInput(Problem(where=str(output), what="exists already", fix="Give a directory that does not exist"))
    base = _base(artifact, given)
    environment.prepare()
    from posttrain.model.merging import EXACT, merge

    merged = merge(artifact, base, output)
    print(f"merged     {artifact.path} into {base.base}: {', '.join(base_notes(artifact))}")
    print(f"sum        differs by {merged.exact:.1e} of the logits' spread in float32 (limit {EXACT:.0e})")
    print(f"weights    differ by {merged.published:.1e} as published (limit {merged.limit:.0e})")
    print(f"published  {merged.artifact.path} {merged.artifact.digest[:12]}")
    return 0


def base_notes(artifact: Artifact) -> list[str]:
    """What is particular about the weights that come out."""
    quantization, added = artifact.manifest.quantization, len(artifact.manifest.added_tokens)
    notes = [artifact.manifest.dtype]
    notes += [f"the base as quantised to {quantization}"] if quantization else []
    notes += [f"{added} added tokens"] if added else []
    return notes


def _given(words: list[str]) -> dict[str, str]:
    given = dict(word.split("=", 1) for word in words)
    for key in given:
        if key not in KEYS:
            raise BadInput(Problem(where=f"merge {key}", what="is not a setting of merge", fix=suggest(key, KEYS)))
    return given


def _adapter(path: Path) -> Artifact:
    if not path.is_dir():
        fix = "Give the directory of a published adapter: runs/RUN/stages/STAGE/artifact"
        raise BadInput(Problem(where=str(path), what="there is no such directory", fix=fix))
    artifact = verify(path)
    if not artifact.is_adapter:
        raise BadInput(
            Problem(where=str(path), what="holds full weights, with nothing to merge", fix="Use it as it is")
        )
    return artifact


def _base(artifact: Artifact, given: dict[str, str]) -> ModelSource:
    """The base that the adapter was trained on, where it was then unless the user says otherwise."""
    path = given.get("model.path", artifact.manifest.base.name)
    return resolve_base(ModelConfig(path=path, revision=given.get("model.revision")), artifact.pins)
