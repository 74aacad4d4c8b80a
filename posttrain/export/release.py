"""The export of an artifact: a GGUF file with its parity measured, the record of it, and a Modelfile for Ollama."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.artifact import Artifact, ModelSource
from posttrain.digests import file_digest
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged, reject
from posttrain.export import parity
from posttrain.export.gguf_file import EXACT, check_plain, write_adapter, write_model
from posttrain.export.parity import Parity
from posttrain.export.tensors import Architecture
from posttrain.export.vocabulary import Vocabulary, read_vocabulary
from posttrain.model import llama
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.model.merging import merge
from posttrain.model.trust import read_json
from posttrain.run.start import find_export_standing

MODELFILE = "Modelfile"
STATES = {"agrees": "", "passed": "", "lossy": ".lossy", "not measured": ".unmeasured"}
"""Answers of the comparison or, for a lossy file, of ``posttrain gate``, and the mark in the file's name."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """One file for llama.cpp."""

    path: Path
    state: str
    """``agrees``, ``lossy``, ``passed`` for a lossy file that a gate has passed, or ``not measured``."""
    parity: Parity | None
    """None where llama.cpp is not installed."""
    adapter: Path | None = None
    """File of the LoRA adapter, beside that of its base in ``path``."""


def export_model(
    artifact: Artifact, base: ModelSource, output: Path, kind: str, pretokenizer: str | None = None
) -> Export:
    """Write the artifact's weights, an adapter merged into them first, as one file of the format ``kind``.

    Raises BadInput for a model or tokenizer that the file cannot hold, and ArtifactDamaged when a file of an exact
    format answers otherwise than the weights; nothing is kept then.
    """
    Architecture.of(base.model if artifact.is_adapter else artifact.path)  # before anything is merged
    with _weights(artifact, base) as source, _draft(output) as draft:
        vocabulary = _vocabulary(source, pretokenizer)
        stem = f"{artifact.manifest.stage}-{artifact.digest[:12]}-{kind}"
        path = draft / f"{stem}.gguf"
        write_model(source.model, path, _name(artifact), vocabulary, kind)
        found = _compare(path, source)
        state = _state(found, kind, (path,), artifact)
        done = output / f"{stem}{STATES[state]}.gguf"
        _keep(artifact, path, done, kind, state, found)
        _write_modelfile(output, vocabulary, done, None)
    return Export(path=done, state=state, parity=found)


def export_adapter(
    artifact: Artifact, base: ModelSource, output: Path, kind: str, pretokenizer: str | None = None
) -> Export:
    """Write the adapter as a file of its own, and its base beside it as one of the format ``kind``.

    Raises as ``export_model`` does, and BadInput for an adapter with more than plain LoRA matrices.
    """
    _check_adapter(artifact)
    source = artifact.source(base)
    with _draft(output) as draft:
        vocabulary = _vocabulary(source, pretokenizer)
        stem = f"{artifact.manifest.stage}-{artifact.digest[:12]}"
        below, above = draft / f"{stem}-base-{kind}.gguf", draft / f"{stem}-lora.gguf"
        write_model(base.model, below, Path(base.base).name, vocabulary, kind)
        write_adapter(artifact.path, base.model, above, _name(artifact))
        found = _compare(below, source, above)
        state = _state(found, kind, (below, above), artifact)
        mark = STATES[state]
        done, adapter = output / f"{stem}-base-{kind}{mark}.gguf", output / f"{stem}-lora{mark}.gguf"
        below.replace(done)
        _keep(artifact, above, adapter, f"lora on {kind}", state, found, done)
        _write_modelfile(output, vocabulary, done, adapter)
    return Export(path=done, state=state, parity=found, adapter=adapter)


def _check_adapter(artifact: Artifact) -> None:
    where, made = str(artifact.path), artifact.manifest
    if not artifact.is_adapter:
        reject(where, "holds full weights, and no adapter", "Use --to gguf")
    check_plain(read_json(artifact.path / "adapter_config.json"), artifact.path)
    if made.quantization or made.added_tokens:
        what = f"its base is quantised to {made.quantization}" if made.quantization else "it has added tokens"
        reject(where, f"{what}, which a GGUF adapter cannot hold", "Merge it into the file: --to gguf")


@contextlib.contextmanager
def _weights(artifact: Artifact, base: ModelSource) -> Iterator[ModelSource]:
    """Yield the artifact as full weights: its own, or those merged into a folder that goes away."""
    if not artifact.is_adapter:
        yield artifact.source(base)
        return
    with tempfile.TemporaryDirectory(prefix="posttrain-export-") as folder:
        merged = merge(artifact, base, Path(folder) / "merged").artifact
        yield replace(merged.source(base), template_variables=base.template_variables)


@contextlib.contextmanager
def _draft(output: Path) -> Iterator[Path]:
    """Yield a folder below ``output`` that is removed in the end."""
    folder = output / ".draft"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _vocabulary(source: ModelSource, pretokenizer: str | None) -> Vocabulary:
    rows = int(Architecture.of(source.model).config["vocab_size"])
    return read_vocabulary(source.tokenizer, rows, with_values(source), pretokenizer)


def with_values(source: ModelSource) -> str:
    """Return the chat template with the pinned values of its variables set at its beginning."""
    lines = [f"{{%- set {name} = {_literal(value)} %}}" for name, value in source.template_variables.items()]
    return "".join(lines) + source.chat_template


def _literal(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _name(artifact: Artifact) -> str:
    return f"{artifact.manifest.recipe} {artifact.manifest.stage} {artifact.digest[:12]}"


def _compare(path: Path, source: ModelSource, adapter: Path | None = None) -> Parity | None:
    if not llama.is_installed():
        return None
    return parity.compare(path, load_model(source, "float32"), load_tokenizer(source), adapter)


def _state(found: Parity | None, kind: str, files: Sequence[Path], artifact: Artifact) -> str:
    """Return the answer of the comparison; for a lossy file the gate's, where ``posttrain gate`` has passed it.

    Raises ArtifactDamaged when an exact format does not agree.
    """
    if found is None:
        return "not measured"
    if kind not in EXACT:
        digest = llama.digest_of_files(files)
        return "passed" if find_export_standing(digest, artifact, Path("runs")).state == "pass" else "lossy"
    if not found.agrees:
        raise ArtifactDamaged(
            f"{files[-1].name} answers otherwise than the artifact: {found.greedy} of {found.prompts} greedy answers "
            f"are equal, and a first token's log-probability differs by {found.log_prob:.3f} (limit {parity.LIMIT}); "
            "nothing was kept"
        )
    return "agrees"


def _keep(
    artifact: Artifact, draft: Path, path: Path, kind: str, state: str, found: Parity | None, below: Path | None = None
) -> None:
    """Move a file to its place, with the record of its comparison beside it, and of the file ``below`` an adapter."""
    record: dict[str, Any] = {
        "artifact": artifact.digest, "file": path.name, "type": kind, "sha256": file_digest(draft),
        "parity": "lossy" if state == "passed" else state,
    }  # fmt: skip
    if below is not None:
        record |= {"base_file": below.name, "base_sha256": file_digest(below)}
    if found is not None:
        record |= {"ids": f"{found.prompts}/{found.prompts}", "log_prob": round(found.log_prob, 6)}
        record |= {"greedy": f"{found.greedy}/{found.prompts}", "xllamacpp": llama.version()}
    draft.replace(path)
    replace_text(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    if state == "passed":  # the same file under its former mark
        for suffix in (".gguf", ".json"):
            path.with_name(f"{path.stem}{STATES['lossy']}{suffix}").unlink(missing_ok=True)


def _write_modelfile(output: Path, vocabulary: Vocabulary, path: Path, adapter: Path | None) -> None:
    """Write the Modelfile of Ollama: its template is no Jinja, so the one in the file is left to it."""
    lines = [f"FROM ./{path.name}"] + ([f"ADAPTER ./{adapter.name}"] if adapter is not None else [])
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in vocabulary.stop_texts]
    lines += [
        "# Ollama's TEMPLATE is no Jinja: it takes that of the file where it knows it, or the one that you write here."
    ]
    replace_text(output / MODELFILE, "\n".join(lines) + "\n")


def figures(found: Parity) -> Mapping[str, str]:
    """Return the figures of a comparison for people, by name."""
    return {
        "ids": f"those of {found.prompts} conversations are equal",
        "log-prob": f"of {found.first} first tokens differ by {found.log_prob:.4f} at most (limit {parity.LIMIT})",
        "greedy": f"{found.greedy} of {found.prompts} answers are equal",
    }
