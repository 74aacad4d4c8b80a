"""Merging of an adapter into its base: full weights, published only when their logits are the adapter's.

The sum is formed in float32 and rounded once, to the number format of training. Under QLoRA the base is the quantised
one, with its values as ordinary weights: the adapter was trained to correct those.
"""

# T = tokens of a prompt, V = vocabulary

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from posttrain.artifact import DOUBT, Artifact, Manifest, ModelSource, publish
from posttrain.digests import digest_of
from posttrain.disk import sync
from posttrain.errors import ArtifactDamaged
from posttrain.model.checks import check_output
from posttrain.model.loading import added_token_ids, attach, load_model, load_tokenizer
from posttrain.model.probe import difference, logits, random_ids
from posttrain.model.quantisation import dequantise
from posttrain.model.reloading import check_published
from posttrain.model.saving import save_model

EXACT = 1e-4
"""Largest difference of the sum in float32 (measured: up to 1e-6, with DoRA 3e-6)."""
MERGED_LIMITS = {"float32": EXACT, "bfloat16": 0.05}
"""Largest difference of the published weights, by their number format: 8 bits move a weight by up to 0.4 %."""
QUESTIONS = ("Hello!", "What is 17 + 25?", "Write one sentence about the sea.", "Name three colours.")


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Distances of merged weights from the adapter: root mean squares over logits, relative to the logits' spread."""

    exact: float
    """Difference of the sum in float32 from the adapter on the same base in float32."""
    published: float
    """Difference of the published weights, loaded again, from the adapter as gates score it."""
    limit: float
    """Largest allowed ``published``."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """An artifact of merged weights."""

    artifact: Artifact
    distances: Distances


def merge(artifact: Artifact, base: ModelSource, destination: Path, doubt: str | None = None) -> Merge:
    """Publish the weights of ``base`` with the adapter of ``artifact`` merged in, as the new folder ``destination``.

    ``doubt`` is the reason for which the adapter is not promoted; the manifest keeps it.

    Raises ArtifactDamaged, and publishes nothing, when the merged weights compute other logits than the adapter.
    """
    dtype = artifact.manifest.dtype
    check_published(artifact.path, base, dtype)
    with _drafted(artifact.source(base), base, dtype, destination) as (draft, distances):
        record = _manifest(artifact, distances, doubt)
        return Merge(artifact=publish(draft, record, destination), distances=distances)


def merge_foreign(source: ModelSource, base: ModelSource, dtype: str, destination: Path) -> Distances:
    """Write the weights of ``base`` with another tool's adapter merged in, as the new folder ``destination``.

    It gets no manifest, because nothing is known of the adapter's training.

    Raises ArtifactDamaged, and writes nothing, when the merged weights compute other logits than the adapter.
    """
    with _drafted(source, base, dtype, destination) as (draft, distances):
        draft.rename(destination)
        sync(destination.parent)
        return distances


def write_whole(source: ModelSource, base: ModelSource, dtype: str, destination: Path) -> Path:
    """Write the weights of ``source`` as the folder ``destination``, unless it is there; return it.

    An adapter is merged into ``base``, and what is added on loading becomes part of the weights: nothing is left that
    another program would have to apply. Raises as ``merge_foreign`` does.
    """
    if destination.is_dir():
        return destination
    if source.adapter is not None:
        merge_foreign(source, base, dtype, destination)
        return destination
    draft = destination.with_name(f".{destination.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_model(load_model(source, dtype), source, draft, dtype)
    return draft.rename(destination)


@contextlib.contextmanager
def _drafted(source: ModelSource, base: ModelSource, dtype: str, destination: Path) -> Iterator[tuple[Path, Distances]]:
    """Yield a folder with the merged weights of ``source``, to be moved to ``destination``, once their logits match."""
    limit = MERGED_LIMITS[dtype]
    prompts = _prompts(source)
    expected = _logits(load_model(source, dtype), prompts)
    model, exact = _merge_weights(source, dtype, prompts)
    _check(exact, EXACT, "merged in float32")
    draft = destination.with_name(f".{destination.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        save_model(model, source, draft, dtype)
        check_output(draft, base)
        whole = replace(source, model=draft, adapter=None, quantization=None, added_tokens=())
        found = difference(_logits(load_model(whole, dtype), prompts), expected)
        _check(found, limit, f"saved in {dtype}")
        yield draft, Distances(exact=exact, published=found, limit=limit)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _merge_weights(source: ModelSource, dtype: str, prompts: Sequence[torch.Tensor]) -> tuple[PreTrainedModel, float]:
    """Return the merged model in float32, and its difference from the adapter on the same weights.

    Compared in float32 first: there a wrong merge cannot hide behind the rounding to bfloat16.
    """
    assert source.adapter is not None
    plain = dequantise(load_model(replace(source, adapter=None), dtype)).float()
    adapted = attach(plain, source.adapter).eval()
    expected = _logits(adapted, prompts)
    model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return model, difference(_logits(model, prompts), expected)


def _prompts(source: ModelSource) -> list[torch.Tensor]:
    """Return ids [1, T] of a few questions in the chat template, and of tokens from all over the vocabulary."""
    tokenizer = load_tokenizer(source)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in QUESTIONS
    ]
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    return [*ids, random_ids(len(tokenizer), added_token_ids(source))]


def _logits(model: Any, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([logits(model, ids_1T) for ids_1T in prompts])


def _check(found: float, limit: float, what: str) -> None:
    if not found <= limit:
        raise ArtifactDamaged(
            f"the weights {what} compute other logits than the adapter: they differ by {found:.1e} of their spread, "
            f"and rounding explains at most {limit:.0e}; nothing was published"
        )


def _manifest(artifact: Artifact, distances: Distances, doubt: str | None) -> Manifest:
    """Return the manifest of the merged weights: the adapter's, with the adapter as parent."""
    made = artifact.manifest
    return replace(
        made,
        parent_digest=artifact.digest,
        fingerprint=digest_of({"merge": artifact.digest}),
        quantization=None,
        merge={
            "adapter": artifact.digest,
            "quantization": made.quantization,
            "float32": distances.exact,
            "published": distances.published,
            "limit": distances.limit,
            **({DOUBT: f"{artifact.named} {doubt}"} if doubt is not None else {}),
        },
    )
