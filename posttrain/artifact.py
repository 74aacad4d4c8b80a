"""Artifacts: published atomically, trusted only when every byte matches the manifest.

<dir>/manifest.json            written last; its digest covers every other file and the lineage
<dir>/adapter_model.safetensors, adapter_config.json      or    model*.safetensors, config.json
<dir>/quantization_config.json                            if the adapter stands on quantised weights
<dir>/tokenizer*.json, chat_template.jinja
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.chat_template import (
    check_template,
)
from posttrain.digests import digest_of, file_digests
from posttrain.disk import sync, write_synced
from posttrain.errors import ArtifactDamaged

FORMAT = 2
MANIFEST = "manifest.json"
QUANTIZATION = "quantization_config.json"
"""Beside an adapter: how the weights under it are quantised, in the form that transformers takes."""
FORBIDDEN = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Names of files that would have to be unpickled."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model is loaded from: weights, perhaps an adapter on them, tokenizer and chat template."""

    name: str
    """``base`` or the name of the stage that made it; for messages."""
    model: Path
    """Directory of full weights."""
    adapter: Path | None
    """Directory of a PEFT adapter on these weights."""
    tokenizer: Path
    """Directory of the tokenizer."""
    chat_template: str
    """Text of the template that training and evaluation use."""
    digest: str
    """SHA-256 over the content of all of it."""
    base: str
    """Hub name or path of the base weights as the recipe gives it; recorded in adapters."""
    model_digest: str
    """SHA-256 over ``model`` alone."""
    lineage: tuple[str, ...] = ()
    """Kinds of the stages that it has been through, in order."""
    quantization: str | None = None
    """``nf4`` when the weights are quantised as they are loaded, because the adapter was trained on them so."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens that the weights lack, and are given rows for as they are loaded."""

    @property
    def weights(self) -> tuple[str, str | None, tuple[str, ...]]:
        """Equal for sources that can share one load of the weights."""
        return self.model_digest, self.quantization, self.added_tokens


@dataclass(frozen=True)
class Artifact:
    """A published result of a stage, verified."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 that names this artifact: its files and its lineage."""
        return str(self.manifest["digest"])

    @property
    def chat_template(self) -> str:
        """Text of the template that it was trained with: evaluation and every later stage use it and no other."""
        return str(self.manifest["chat_template"])

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Special tokens that it was given besides those of the base."""
        return tuple(self.manifest["added_tokens"])

    @property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter rather than full weights."""
        return (self.path / "adapter_config.json").exists()

    def source(self, base: ModelSource) -> ModelSource:
        """How to load it; ``base`` holds the weights under an adapter.

        Raises ArtifactDamaged when the artifact was made on other base weights.
        """
        recorded = self.manifest["base"]["digest"]
        if recorded != base.model_digest:
            raise ArtifactDamaged(
                f"{self.path} was trained on base weights {recorded[:12]}, "
                f"but {base.base} holds {base.model_digest[:12]}"
            )
        return ModelSource(
            name=str(self.manifest["stage"]),
            model=base.model if self.is_adapter else self.path,
            adapter=self.path if self.is_adapter else None,
            tokenizer=self.path,
            chat_template=self.chat_template,
            digest=self.digest,
            base=base.base,
            model_digest=base.model_digest if self.is_adapter else self.digest,
            lineage=tuple(self.manifest["lineage"]),
            quantization=self.manifest["quantization"],
            added_tokens=self.added_tokens if self.is_adapter else (),
        )


def publish(draft: Path, manifest: Mapping[str, Any], destination: Path) -> Artifact:
    """Move the folder ``draft`` to ``destination`` so that it is there whole or not at all.

    Every file is hashed and synced, the manifest is written last, then the folder is renamed and its parent synced.
    A crash at any point leaves either nothing or a verified artifact at ``destination``. Raises OSError when the disk
    refuses; the draft is removed then, and nothing already published is touched.
    """
    try:
        files = _content(draft)
        entries = {
            name: {"sha256": sha, "size": files[name].stat().st_size} for name, sha in file_digests(files).items()
        }
        record = {"format": FORMAT, **manifest, "files": entries}
        record["digest"] = digest_of(record)
        for path in files.values():
            sync(path)
        write_synced(draft / MANIFEST, json.dumps(record, indent=2, sort_keys=True) + "\n")
        for folder in sorted({path.parent for path in files.values()} | {draft}):
            sync(folder)
        draft.rename(destination)
        sync(destination.parent)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Artifact(destination, record)


def verify(path: Path) -> Artifact:
    """The artifact in ``path``, every byte checked against its manifest; raises ArtifactDamaged naming what differs."""
    manifest = read_manifest(path)
    if "chat_template" in manifest:  # a checkpoint has none
        check_template(path, manifest["chat_template"])
    expected = manifest["files"]
    present = _content(path)
    missing, extra = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
    if missing or extra:
        raise ArtifactDamaged(f"{path} is damaged: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}")
    for name, sha in file_digests(present).items():
        wanted = expected[name]["sha256"]
        if sha != wanted:
            raise ArtifactDamaged(
                f"{path / name} is damaged: its SHA-256 is {sha[:12]}, the manifest says {wanted[:12]}"
            )
    return Artifact(path, manifest)


def quantization_of(folder: Path) -> str | None:
    """The quantised form of the weights under the adapter in ``folder``, such as ``nf4``; None when they are as saved.

    Raises ArtifactDamaged when the folder's record of it cannot be read.
    """
    path = folder / QUANTIZATION
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["bnb_4bit_quant_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactDamaged(f"{path} describes no quantisation: {error!r}") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in ``path``, itself checked but not the files it lists; raises ArtifactDamaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        claimed = manifest["digest"]
        actual = digest_of({key: value for key, value in manifest.items() if key != "digest"})
        files, version = manifest["files"], manifest["format"]
    except FileNotFoundError:
        raise ArtifactDamaged(f"{path} is not an artifact: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtifactDamaged(f"{path / MANIFEST} is damaged: {error}") from None
    if version != FORMAT:
        raise ArtifactDamaged(f"{path / MANIFEST} has format {version}; this version reads {FORMAT}")
    if claimed != actual or not isinstance(files, dict):
        raise ArtifactDamaged(f"{path / MANIFEST} is damaged: its content does not match its digest")
    return dict(manifest)


def _content(folder: Path) -> dict[str, Path]:
    """Every file below ``folder`` but the manifest, by relative name."""
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if (path.is_file() or path.is_symlink()) and path != folder / MANIFEST
    }
    for name, path in files.items():
        if path.is_symlink():
            raise ArtifactDamaged(f"{path} is a link; an artifact holds its own bytes")
        if path.suffix in FORBIDDEN:
            raise ArtifactDamaged(
                f"{path} would have to be unpickled; artifacts hold safetensors and JSON only: {name}"
            )
    return files
