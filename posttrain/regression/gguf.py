"""A file of llama.cpp as the candidate of ``posttrain gate``: the artifact that it was written from, or a base.

``posttrain export`` writes a record beside each file, with the digests of the file and of its artifact. A file without
one is compared with the base that the user gives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from posttrain.artifact import MANIFEST, read_manifest
from posttrain.config.regression import GGUF, BaseSettings
from posttrain.digests import file_digest
from posttrain.errors import ArtifactDamaged, BadInput, Problem, brief, nearest, reject
from posttrain.model.llama import PACKAGE, digest_of_files, version
from posttrain.regression.candidate import Candidate, dtype_of, find_base, read_candidate
from posttrain.saved import as_kind, read_json

SIZES = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size"}
"""Sizes in a file, with their names in the configurations of transformers."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The record that ``posttrain export`` writes beside a file, as far as a gate reads it."""

    artifact: str
    """Digest of the artifact that the file was written from."""
    sha256: str
    base_file: str | None = None
    """Name of the file beside it that an adapter's file stands on."""
    base_sha256: str | None = None


def is_file(adapter: str) -> bool:
    """Tell whether a candidate is a file of llama.cpp."""
    return adapter.endswith(GGUF)


def read_file(path: Path, model: BaseSettings, root: Path, day: str | None = None) -> Candidate:
    """Read a GGUF file and find what it is compared with: the base of its artifact, or the one in ``model``.

    Raises ArtifactDamaged for a file that is not the one of its record, or is no GGUF file; BadInput when its artifact
    or base is missing.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        close = nearest(path.name, [each.name for each in path.parent.glob(f"*{GGUF}")])
        fix = f"Did you mean {path.parent / close}?" if close else "posttrain export ARTIFACT --to gguf writes one"
        reject(str(path), "there is no such file", fix)
    record = _record(path)
    found = _written_from(path, model, root, day, record)
    files: tuple[Path, ...] = (path,)
    if _read(path)["general.type"] == "adapter":
        files = (_base_file(path, record), path)
    digest = digest_of_files(files)
    named = f"{path.name} ({PACKAGE} {version()})"
    source = replace(
        found.source, name=named, adapter=None, llama=files, digest=digest, content_digest=digest, model_digest=digest,
        model=found.base.model, rows=None, quantization=None,
    )  # fmt: skip
    return replace(found, path=path, source=source, verified=False)


def require_same_model(candidate: Candidate, vocabulary: dict[str, int]) -> None:
    """Raise BadInput unless a file has the sizes of its base, and the tokens of a tokenizer under the same ids."""
    file, path = _read(candidate.source.llama[0]), candidate.path
    config = read_json(candidate.base.model / "config.json")
    for name, ours in SIZES.items():
        found = file.get(f"{file.get('general.architecture')}.{name}")
        if found != config.get(ours):
            what = f"its {name} is {found}, but {ours} of {candidate.base.base} is {config.get(ours)}: another base"
            raise BadInput(Problem(where=str(path), what=what, fix="Give its base: model.path=DIR"))
    tokens: Sequence[str] = file.get("tokenizer.ggml.tokens", ())
    for token, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        theirs = tokens[number] if number < len(tokens) else None
        if theirs != token:
            what = f"token {number} is {theirs!r} in it, and {token!r} in the tokenizer of {candidate.base.base}"
            raise BadInput(Problem(where=str(path), what=what, fix="Give the base with its tokenizer: model.path=DIR"))


def _record(path: Path) -> Record | None:
    """Return the record beside a file, None without one. Raises ArtifactDamaged when it is not about this file."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    values = as_kind(dict, read_json(beside), str(beside))
    known = {each.name: values[each.name] for each in fields(Record) if each.name in values}
    record = as_kind(Record, known, str(beside))
    if file_digest(path) != record.sha256:
        raise ArtifactDamaged(f"{path} is damaged: its SHA-256 is not the one in {beside.name}; export it again")
    return record


def _written_from(path: Path, model: BaseSettings, root: Path, day: str | None, record: Record | None) -> Candidate:
    """Return the artifact that a file was written from, or the base that the user gives."""
    if record is not None and (artifact := _artifact(path, root, record.artifact)) is not None:
        return read_candidate(artifact, model, day)
    if model.path is None:
        what = "has no record of export beside it, and does not name its base"
        if record is not None:
            what = f"was written from the artifact {record.artifact[:12]}, which is not below {root}"
        reject(str(path), what, "Give the base to compare with: model.path=DIR or a hub name; or output_root=DIR")
    base = find_base(path, model, None, None).dated(day)
    return Candidate(path=path, source=base, base=base, dtype=dtype_of(model, base), verified=False)


def _artifact(path: Path, root: Path, digest: str) -> Path | None:
    """Return the folder of the artifact with a digest: beside the folder of the file, or below the output root."""
    folders = [*path.parent.parent.glob("artifact*"), *sorted(root.glob("*/stages/*/artifact*"))]
    for folder in folders:
        if not os.path.lexists(folder / MANIFEST):
            continue
        try:
            if read_manifest(folder)["digest"] == digest:
                return folder
        except ArtifactDamaged:  # another one may be meant
            continue
    return None


def _base_file(path: Path, record: Record | None) -> Path:
    """Return the file that an adapter's file stands on, which must be the one that it was exported with."""
    if record is None or record.base_file is None:
        fix = "posttrain export ARTIFACT --to gguf-lora writes both; or judge one file: --to gguf"
        reject(str(path), "is the file of an adapter, and no record beside it names the file of its base", fix)
    below = path.parent / Path(record.base_file).name
    if not below.is_file():
        reject(str(path), f"stands on {below.name}, which is not beside it", "Put it back, or export the adapter again")
    if file_digest(below) != record.base_sha256:
        what = f"stands on another file than {below.name}: the SHA-256 in its record differs"
        reject(str(path), what, "Export the adapter again: both files are written")
    return below


def _read(path: Path) -> dict[str, Any]:
    """Return the values at the beginning of a GGUF file. Raises ArtifactDamaged when it is none, or is cut short."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        wanted = {name: fields[name].contents() for name in fields if not name.endswith((".merges", ".scores"))}
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise ArtifactDamaged(f"{path} is no GGUF file, or is damaged: {brief(error)}") from None
    return {"general.type": "model", **wanted}
