"""Artifacts: published atomically, trusted only when every byte matches the manifest.

<dir>/manifest.json            written last; its digest covers every other file and the lineage
<dir>/adapter_model.safetensors, adapter_config.json      or    model*.safetensors, config.json
<dir>/quantization_config.json                            if the adapter stands on quantised weights
<dir>/tokenizer*.json, chat_template.jinja
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from posttrain.chat_template import DATE, check_template, template_digest, today, variables_of
from posttrain.digests import digest_of, file_digests
from posttrain.disk import sync, write_synced
from posttrain.errors import ArtifactDamaged, nearest, reject
from posttrain.saved import as_kind, read_json

FORMAT = 2
MANIFEST = "manifest.json"
QUANTIZATION = "quantization_config.json"
"""File beside an adapter: the quantisation of the weights under it, in the format of transformers."""
CARD = "README.md"
ABOUT = (CARD, ".gitattributes")
"""Files in an artifact's folder that are about it: written after its verdict, so that its digest cannot cover them."""
FORBIDDEN = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Suffixes of pickled files: reading one can run any code."""
DOUBT = "unpromoted"
"""Key of a manifest's ``merge`` for the reason why the merged adapter is not promoted."""
PLACES = ("artifact*", "*/artifact*", "stages/*/artifact*", "*/stages/*/artifact*", "runs/*/stages/*/artifact*")
"""Artifacts below the folder of a stage, of stages, of a run, of runs, and below the one in which runs are made."""
MOST_NAMED = 8
"""Artifacts that one message names."""
OPTIONAL = ("merge", "plugin_settings", "template_variables")
"""Fields left out of a manifest when they are None."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Everything a model is loaded from: weights, an adapter on them or none, tokenizer, chat template."""

    name: str
    """``base`` or the name of the stage that made it, for messages."""
    model: Path
    """Directory of full weights."""
    adapter: Path | None
    """Directory of a PEFT adapter on these weights."""
    tokenizer: Path
    """Directory of the tokenizer."""
    chat_template: str
    """Text of the template for training and evaluation."""
    digest: str
    """SHA-256 over the content of all of it."""
    base: str
    """Hub name or path of the base weights, as in the recipe; recorded in adapters."""
    model_digest: str
    """SHA-256 over ``model`` alone."""
    lineage: tuple[str, ...] = ()
    """Kinds of its stages, in order."""
    quantization: str | None = None
    """``nf4`` when the weights are quantised on loading, because the adapter was trained on quantised weights."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens missing from the weights; each gets an embedding row on loading."""
    rows: int | None = None
    """Rows of the embeddings, where an adapter of another tool brings more or fewer than the weights have; else None.
    Beside such an adapter, the base reads the other tokens as the mean of its own."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """Values of the template's variables in every rendering; ``date`` is the day that it prints."""
    content_digest: str = ""
    """SHA-256 of a base without these values."""
    llama: tuple[Path, ...] = ()
    """Files of llama.cpp that answer in place of the weights: the model's, then that of an adapter on it."""

    def with_variables(self, variables: Mapping[str, Any]) -> ModelSource:
        """Return a base rendered with these values of the template's variables; they are part of its digest."""
        content = self.content_digest or self.digest
        digest = digest_of({"content": content, "template_variables": dict(variables)}) if variables else content
        return replace(self, template_variables=dict(variables), digest=digest, content_digest=content)

    def dated(self, day: str | None = None) -> ModelSource:
        """Return a base whose template prints ``day``, or today; the same base when the day is set, or not printed."""
        if DATE in self.template_variables or DATE not in variables_of(self.chat_template):
            return self
        return self.with_variables({**self.template_variables, DATE: day or today()})

    @property
    def weights(self) -> tuple[str, str | None, tuple[str, ...]]:
        """Key of the loaded weights: sources with equal keys can share one load."""
        return self.model_digest, self.quantization, self.added_tokens


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """The base weights under an artifact."""

    name: str
    """Hub name or path, as in the recipe."""
    digest: str
    """SHA-256 over the weights."""


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Chat template and added tokens pinned by an adapter; its base is loaded with the same ones."""

    path: Path
    """Directory of the adapter, for messages."""
    chat_template: str
    """Text of the template."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens beyond those of the base."""
    template_variables: Mapping[str, Any] | None = None
    """Values of the template's variables; None when the recipe may choose them."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file in ``manifest.json``."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Lineage and figures of an artifact.

    Two runs of the same stage give equal manifests, so nothing here is a time. ``manifest.json`` adds the SHA-256 of
    every file and of the whole.
    """

    stage: str
    """Name of the stage's node in the recipe."""
    kind: str
    """Kind of the stage, such as ``dpo``."""
    plugin: str
    """Plugin of the stage, with its version."""
    plugins: tuple[str, ...]
    """Other plugins behind the training data, with their versions: of hooks, of filters, of readers of its files."""
    recipe: str
    """Name of the recipe."""
    base: BaseWeights
    """Base weights under or before it."""
    parent_digest: str
    """Digest of the artifact or base under the stage."""
    lineage: tuple[str, ...]
    """Kinds of the stages from the base to this artifact, in order."""
    data_digest: str
    """SHA-256 over the sources of the stage."""
    chat_template: str
    """Text of the template for training, evaluation and every later stage."""
    added_tokens: tuple[str, ...]
    """Special tokens beyond those of the base."""
    fingerprint: str
    """SHA-256 of everything the result depends on: settings, parent, data, seed, number format, code."""
    config: Mapping[str, Any]
    """Resolved settings of the stage, without its gate."""
    seed: int
    """Seed of the run."""
    dtype: str
    """``float32`` or ``bfloat16``."""
    quantization: str | None
    """``nf4`` for an adapter trained on 4-bit weights."""
    versions: Mapping[str, str]
    """Versions of the packages at work, by name."""
    metrics: Mapping[str, Any]
    """Figures of training: steps, tokens, losses, warnings."""
    merge: Mapping[str, Any] | None = None
    """Adapter, quantisation, measured differences, and why it was not promoted, for weights merged from an adapter."""
    plugin_settings: Mapping[str, Any] | None = None
    """Settings of plugins shaping the data, by name; None when there are none."""
    template_variables: Mapping[str, Any] | None = None
    """Values of the template's variables, with the day that it prints; None when there are none."""

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values, without the hashes of files."""
        values = asdict(self) | {"template_sha256": template_digest(self.chat_template)}
        return {name: value for name, value in values.items() if value is not None or name not in OPTIONAL}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], path: Path) -> Manifest:
        """Return the manifest in ``values``; ``path`` names its file in errors.

        Raises ArtifactDamaged when a field is missing or its value has another type.
        """
        given = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return as_kind(cls, given, str(path))


@dataclass(frozen=True)
class Artifact:
    """The verified, published result of a stage."""

    path: Path
    """Its folder."""
    manifest: Manifest
    """Lineage and figures."""
    digest: str
    """SHA-256 over its files and its lineage: the artifact's name."""

    @property
    def pins(self) -> Pins:
        """Chat template with its variables, and added tokens, for loading its base."""
        made = self.manifest
        return Pins(
            path=self.path,
            chat_template=made.chat_template,
            added_tokens=made.added_tokens,
            template_variables=made.template_variables or {},
        )

    @property
    def is_adapter(self) -> bool:
        """True for an adapter, False for full weights."""
        return (self.path / "adapter_config.json").exists()

    @property
    def named(self) -> str:
        """Name of its stage and the beginning of its digest, for messages and records."""
        return f"{self.manifest.stage} {self.digest[:12]}"

    def source(self, base: ModelSource) -> ModelSource:
        """Return the model's source; ``base`` holds the weights under an adapter.

        Raises ArtifactDamaged when the artifact was made on other base weights.
        """
        made_on, adapter = self.manifest.base.digest, self.is_adapter
        if made_on != base.model_digest:
            raise ArtifactDamaged(
                f"{self.path} was trained on base weights {made_on[:12]}, "
                f"but {base.base} holds {base.model_digest[:12]}"
            )
        return ModelSource(
            name=self.manifest.stage,
            model=base.model if adapter else self.path,
            adapter=self.path if adapter else None,
            tokenizer=self.path,
            chat_template=self.manifest.chat_template,
            digest=self.digest,
            base=base.base,
            model_digest=base.model_digest if adapter else self.digest,
            lineage=self.manifest.lineage,
            quantization=self.manifest.quantization,
            added_tokens=self.manifest.added_tokens if adapter else (),
            template_variables=base.template_variables,
        )


def publish(draft: Path, manifest: Manifest, destination: Path) -> Artifact:
    """Move the folder ``draft`` to ``destination``, whole or not at all, and return the artifact.

    Raises OSError when the disk is full or fails, and removes the draft. Nothing already published changes.
    """
    return Artifact(destination, manifest, publish_folder(draft, manifest.to_json(), destination))


def require_artifact(path: Path) -> Path:
    """Return the folder of the artifact that a user names. Raises BadInput, with those near it, where there is none."""
    if not os.path.lexists(path / MANIFEST):
        what = f"holds no artifact: it has no {MANIFEST}" if path.is_dir() else "there is no such directory"
        reject(str(path), what, artifacts_near(path))
    return path


def artifacts_near(path: Path) -> str:
    """Return the fix for a folder without an artifact: those below it, or below what there is of its path."""
    for folder in (path, *path.parents):
        found = {each.parent.relative_to(folder) for place in PLACES for each in folder.glob(f"{place}/{MANIFEST}")}
        if found:
            # of those in the folder that was named, none is nearer
            close = None if folder == path else nearest(str(path.relative_to(folder)), map(str, found))
            named = ", ".join(sorted(str(folder / each) for each in found))
            listed = named if len(found) <= MOST_NAMED else f"{len(found):,} below {folder}"
            return (f"Did you mean {folder / close}? " if close else "") + f"Available: {listed}"
    return "An artifact is a folder such as runs/RUN/stages/STAGE/artifact"


def verify(path: Path) -> Artifact:
    """Return the artifact in ``path``, every byte checked; raise ArtifactDamaged and name the difference."""
    values = read_manifest(path)
    manifest = Manifest.from_json(values, path / MANIFEST)
    check_template(path, manifest.chat_template)
    check_files(path, values["files"])
    return Artifact(path, manifest, values["digest"])


def publish_folder(draft: Path, values: Mapping[str, Any], destination: Path) -> str:
    """Move ``draft`` to ``destination`` with a manifest of ``values`` and of its files; return its digest.

    Raises OSError when the disk is full or fails, and removes the draft.
    """
    try:
        files = _content(draft)
        entries = {
            name: {"sha256": sha, "size": files[name].stat().st_size} for name, sha in file_digests(files).items()
        }
        record = {"format": FORMAT, **values, "files": entries}
        record["digest"] = digest_of(record)
        # The order is the promise: content before the manifest, the manifest before the name. A crash between any two
        # leaves either nothing or a verified folder at ``destination``.
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
    return str(record["digest"])


def verify_folder(path: Path) -> dict[str, Any]:
    """Return the manifest of a published folder, every byte checked; raise ArtifactDamaged and name the difference."""
    values = read_manifest(path)
    check_files(path, values["files"])
    return values


def check_files(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise ArtifactDamaged unless the files in ``path`` are exactly the ones in its manifest."""
    present = _content(path)
    missing, extra = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
    extra = [name for name in extra if name not in ABOUT]
    if missing or extra:
        raise ArtifactDamaged(f"{path} is damaged: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}")
    for name, sha in file_digests({name: present[name] for name in expected}).items():
        wanted = expected[name]["sha256"]
        if sha != wanted:
            raise ArtifactDamaged(f"{path / name} is damaged: its SHA-256 is {sha[:12]}, in the manifest {wanted[:12]}")


def quantization_of(folder: Path) -> str | None:
    """Return the quantisation of the weights under the adapter in ``folder``, such as ``nf4``, or None.

    Raises ArtifactDamaged when its record in the folder cannot be read.
    """
    path = folder / QUANTIZATION
    if not path.exists():
        return None
    try:
        return str(read_json(path)["bnb_4bit_quant_type"])
    except (KeyError, TypeError) as error:
        raise ArtifactDamaged(f"{path} describes no quantisation: {error!r}") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the values of the manifest in ``path``; raise ArtifactDamaged when they do not match their digest.

    Reads the manifest alone; check_files reads the files in it.
    """
    try:
        manifest = as_kind(dict, read_json(path / MANIFEST), str(path / MANIFEST))
    except FileNotFoundError:
        raise ArtifactDamaged(f"{path} is not an artifact: it has no {MANIFEST}") from None
    if missing := [name for name in ("digest", "files", "format") if name not in manifest]:
        raise ArtifactDamaged(f"{path / MANIFEST} is damaged: it lacks {', '.join(missing)}")
    claimed, files, version = manifest["digest"], manifest["files"], manifest["format"]
    actual = digest_of({key: value for key, value in manifest.items() if key != "digest"})
    if version != FORMAT:
        raise ArtifactDamaged(f"{path / MANIFEST} has format {version}; this version reads {FORMAT}")
    if claimed != actual:
        raise ArtifactDamaged(f"{path / MANIFEST} is damaged: its content does not match its digest")
    as_kind(dict[str, FileEntry], files, str(path / MANIFEST))
    return manifest


def _content(folder: Path) -> dict[str, Path]:
    """Return every file below ``folder`` but the manifest, by relative name; raise ArtifactDamaged on an unsafe one."""
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
