"""The candidate of ``posttrain gate``: an artifact, any peft adapter or full weights, and the base under it.

Nothing here loads a model. An artifact is verified against its manifest, and its base against what it was trained on;
for anything else the base comes from adapter_config.json, or from the user.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain.artifact import MANIFEST, ModelSource, Pins, artifacts_near, quantization_of, verify
from posttrain.chat_template import DATE, TEMPLATE, TOKENIZER_CONFIG, template_diff, template_in_config
from posttrain.config.regression import BaseSettings
from posttrain.config.schema import ModelConfig
from posttrain.digests import digest_of, file_digests
from posttrain.errors import BadInput, Problem, nearest
from posttrain.model.base import PICKLED, TOKENIZER_FILES, resolve_base
from posttrain.model.trust import check_adapter, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of a tokenizer; a folder with one of them has its own."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An adapter or a model, and its base."""

    path: Path
    source: ModelSource
    base: ModelSource
    dtype: str
    verified: bool
    """True when it is an artifact whose files are those of its manifest."""
    held: frozenset[int] = frozenset()
    """Ids of the tokens with embeddings in the adapter or the base, where the adapter brings some; else empty."""


def read_candidate(path: Path, model: BaseSettings, day: str | None = None) -> Candidate:
    """Read the adapter or model in ``path`` and find its base; ``model`` overrides the base's settings.

    ``day`` is printed by the template of anything but an artifact, today by default.

    Raises ArtifactDamaged when an artifact or its base does not match the manifest, BadInput for anything else.
    """
    path = path.expanduser().resolve()
    if not path.is_dir():
        siblings = [item.name for item in path.parent.glob("*/")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        fix = f"Did you mean {path.parent / close}?" if close else artifacts_near(path)
        raise BadInput(Problem(where=str(path), what="there is no such directory", fix=fix))
    if os.path.lexists(path / MANIFEST):
        return _artifact(path, model, day)
    if (path / ADAPTER_CONFIG).exists():
        return _adapter(path, model, day)
    return _weights(path, model, day)


def require_same_ground(candidate: Candidate, baseline: Candidate) -> None:
    """Raise BadInput unless the candidate and the baseline share one base and one chat template with its variables."""
    problems = []
    if candidate.base.model_digest != baseline.base.model_digest:
        what = f"is based on {baseline.base.base}, but {candidate.path} on {candidate.base.base}: other weights"
        problems.append(Problem(where=str(baseline.path), what=what, fix="Compare adapters of one base"))
    if candidate.source.chat_template != baseline.source.chat_template:
        difference = template_diff(baseline.source.chat_template, candidate.source.chat_template)
        what = f"has another chat template than {candidate.path}:\n{difference}"
        problems.append(Problem(where=str(baseline.path), what=what, fix="Compare adapters of one template"))
    # All are asked in the candidate's words, so the day of the baseline's training does not matter.
    then, now = ({**each.source.template_variables, DATE: None} for each in (baseline, candidate))
    if then != now:
        what = f"has other template variables than {candidate.path}: {then}, not {now}"
        problems.append(Problem(where=str(baseline.path), what=what, fix="Compare adapters of the same variables"))
    if problems:
        raise BadInput(problems)


def _artifact(path: Path, model: BaseSettings, day: str | None) -> Candidate:
    artifact = verify(path)
    base = find_base(path, model, artifact.manifest.base.name, artifact.pins).dated(day)
    return Candidate(
        path=path,
        source=artifact.source(base),
        base=base,
        dtype=model.dtype.value if model.dtype is not None else artifact.manifest.dtype,
        verified=True,
    )


def _adapter(path: Path, model: BaseSettings, day: str | None) -> Candidate:
    check_adapter(path)
    config = read_json(path / ADAPTER_CONFIG)
    weights = path / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = any(path.glob(pattern) for pattern in PICKLED)
        what = f"holds no {ADAPTER_WEIGHTS}" + (", and pickled weights are not read" if pickled else "")
        raise BadInput(Problem(where=str(path), what=what, fix="Save the adapter with safe_serialization=True"))
    base = find_base(path, model, config.get("base_model_name_or_path"), _own_template(path)).dated(day)
    tokenizer = path if _brings_tokenizer(path) else base.tokenizer
    digest = digest_of(
        {
            "adapter": file_digests({"config": path / ADAPTER_CONFIG, "weights": weights}),
            "tokenizer": file_digests(_present(tokenizer)),
            "chat_template": base.chat_template,
            "base": base.model_digest,
        }
    )
    source = replace(
        base, name=path.name, adapter=path, tokenizer=tokenizer, digest=digest, content_digest=digest,
        quantization=quantization_of(path),
    ).with_variables(base.template_variables)  # fmt: skip
    return Candidate(path=path, source=source, base=base, dtype=dtype_of(model, base), verified=False)


def _weights(path: Path, model: BaseSettings, day: str | None) -> Candidate:
    if not (path / "config.json").is_file():
        what = "holds no artifact, no adapter and no full weights"
        raise BadInput(Problem(where=str(path), what=what, fix=artifacts_near(path)))
    if model.path is None:
        what = "holds full weights, and those do not name their base"
        raise BadInput(
            Problem(where=str(path), what=what, fix="Give the base to compare with: model.path=DIR or a hub name")
        )
    own = _own_template(path)
    base = find_base(path, model, None, own).dated(day)
    template = None if own is not None else model.chat_template
    pinned = own or Pins(path=path, chat_template=base.chat_template)
    config = ModelConfig(path=str(path), chat_template=template, template_variables=model.template_variables)
    source = resolve_base(config, pinned, dated=False).dated(day)
    return Candidate(
        path=path, source=replace(source, name=path.name), base=base, dtype=dtype_of(model, source), verified=False
    )


def find_base(path: Path, model: BaseSettings, named: object, pinned: Pins | None) -> ModelSource:
    """Find the base given by the user or named by the adapter, with the adapter's chat template and tokens if any."""
    chosen = model.path if model.path is not None else named
    if not isinstance(chosen, str) or not chosen:
        what = "does not name its base"
        raise BadInput(Problem(where=str(path), what=what, fix="Give the base: model.path=DIR or a hub name"))
    config = ModelConfig(
        path=chosen,
        revision=model.revision,
        chat_template=model.chat_template,
        template_variables=model.template_variables,
    )
    try:
        return resolve_base(config, pinned, dated=False)
    except BadInput as error:
        if model.path is not None:
            raise
        fix = "Give the base's present place: model.path=DIR or a hub name"
        raise BadInput([*error.problems, Problem(where=str(path), what=f"was trained on {chosen}", fix=fix)]) from None


def _own_template(path: Path) -> Pins | None:
    """Return the folder's own chat template, for the base to be asked with as well; None when it has none."""
    file = path / TEMPLATE
    template = file.read_bytes().decode("utf-8") if file.is_file() else template_in_config(path / TOKENIZER_CONFIG)
    return Pins(path=path, chat_template=template) if template else None


def _brings_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in VOCABULARIES)


def _present(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def dtype_of(model: BaseSettings, source: ModelSource) -> str:
    """Return the user's number format, or float32 for weights stored so, else bfloat16."""
    if model.dtype is not None:
        return model.dtype.value
    config = read_json(source.model / "config.json")
    stored = config.get("dtype", config.get("torch_dtype"))
    return "float32" if stored == "float32" else "bfloat16"
