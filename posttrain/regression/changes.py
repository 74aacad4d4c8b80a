"""Checks before a candidate is scored: it fits its base, shares the baseline's tokenizer, and changes something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from posttrain.errors import ArtifactDamaged, BadInput, GateFailed, Problem
from posttrain.model.added_tokens import brought_rows
from posttrain.model.loading import load_tokenizer
from posttrain.model.probe import random_ids
from posttrain.model.reloading import base_rows, check_names, check_published, empty_model, probe_both
from posttrain.model.trust import foreign
from posttrain.regression.candidate import ADAPTER_WEIGHTS, Candidate
from posttrain.scoring.fingerprint import tokenizer_digest


def with_brought_rows(candidate: Candidate) -> Candidate:
    """Return the candidate with as many embedding rows as its adapter brings: other tools save whole embeddings.

    The base beside it knows the other tokens by their place alone.
    """
    adapter = candidate.source.adapter
    if adapter is None or candidate.verified:
        return candidate
    brought = brought_rows(adapter, empty_model(candidate.base))
    if brought is None:
        return candidate
    rows, held = brought
    return replace(
        candidate,
        source=replace(candidate.source, rows=rows),
        base=replace(candidate.base, rows=rows),
        held=frozenset(held),
    )


def require_tokenizer(candidate: Candidate) -> PreTrainedTokenizerBase:
    """Return the candidate's tokenizer, with which every system is asked.

    Raises BadInput when it gives the base's tokens other ids, or has ids that the base has no embeddings for.
    """
    own, base = load_tokenizer(candidate.source), load_tokenizer(candidate.base)
    ids, known = own.get_vocab(), base.get_vocab()
    moved = sorted(token for token, index in known.items() if ids.get(token) != index)
    if moved:
        what = f"its tokenizer is not that of {candidate.base.base}: {moved[0]!r} has another id, or none"
        raise BadInput(Problem(where=str(candidate.path), what=what, fix="Give the base that it was trained on"))
    held = candidate.held or range(base_rows(candidate.base))
    beyond = sorted(ids.keys() - known.keys() - set(candidate.base.added_tokens), key=ids.__getitem__)
    if missing := [token for token in beyond if ids[token] not in held]:
        what = f"its tokenizer adds {', '.join(missing)}, which {candidate.base.base} has no embeddings for, nor has it"
        fix = "Save them with the adapter: modules_to_save, trainable_token_indices or, here, model.added_tokens"
        raise BadInput(Problem(where=str(candidate.path), what=what, fix=fix))
    return own


def require_same_tokenizer(own: PreTrainedTokenizerBase, baseline: Candidate) -> None:
    """Raise BadInput when a baseline's tokenizer is not equal to the candidate's."""
    if tokenizer_digest(own) != tokenizer_digest(load_tokenizer(baseline.source)):
        what = "its tokenizer is not the candidate's: the two would be asked other tokens"
        raise BadInput(Problem(where=str(baseline.path), what=what, fix="Compare adapters with one tokenizer"))


def require_change(candidate: Candidate) -> None:
    """Raise GateFailed when the candidate computes the same as its base, ArtifactDamaged when it does not fit it.

    An artifact that changes nothing is damaged: publishing would have found it.
    """
    source, base = candidate.source, candidate.base
    if candidate.verified:
        check_published(candidate.path, base, candidate.dtype)
        return
    if source.adapter is not None:
        with foreign(source.adapter, "the adapter cannot be read"):
            if cause := _zeros(source.adapter):
                raise GateFailed(f"{candidate.path} changes nothing: {cause}")
            if PeftConfig.from_pretrained(source.adapter).peft_type == "LORA":
                check_names(source.adapter, source, embeddings=True)
    with foreign(candidate.path, "the model cannot be run"):
        known = base_rows(base)
        ids_1T = random_ids(min(known, source.rows or known))
        found_TV, expected_TV = probe_both(source, base, candidate.dtype, ids_1T)
    if not torch.isfinite(found_TV).all():
        raise ArtifactDamaged(f"{candidate.path}: its logits are not finite; its weights hold NaN or infinity")
    if torch.equal(found_TV, expected_TV):
        raise GateFailed(f"{candidate.path} changes nothing: its logits are those of {base.base} to the last bit")


def _zeros(adapter: Path) -> str | None:
    """Name the half of a low-rank adapter that is zero everywhere, and with it the product; None without one."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        names = list(file.keys())
        low_rank = [name for name in names if ".lora_" in name]
        for half in ("lora_B", "lora_A"):
            matrices = [name for name in low_rank if f".{half}." in name]
            # DoRA's lengths, biases and whole layers can change something without a product
            if matrices and len(low_rank) == len(names) and not any(_any(file, name) for name in matrices):
                return f"every {half} is zero"
    return None


def _any(file: object, name: str) -> bool:
    tensor: torch.Tensor = file.get_tensor(name)  # type: ignore[attr-defined]
    return bool(torch.count_nonzero(tensor))
