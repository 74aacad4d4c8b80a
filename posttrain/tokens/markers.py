"""Signs of a chat template from another family of models than the tokenizer and the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.tokens.chat import Rendered
from posttrain.tokens.table import TEXTS

MARKER = re.compile(r"<[|｜][^\s<>]{1,40}?[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
"""Borders of turns in the families ChatML, Llama 3, Zephyr, Phi, DeepSeek; Gemma; Mistral."""
SEEN = TEXTS
"""Documents to compare: a marker in all of them comes from the template, not from a content."""


def family_faults(tokenizer: Any, documents: Sequence[Rendered], ends: Iterable[int | None]) -> list[str]:
    """Return lines for markers without a token of their own, and for a stop token at which the base does not stop.

    Args:
        tokenizer: The tokenizer of the model.
        documents: Trained conversations.
        ends: Stop tokens in the model's generation settings, in addition to the tokenizer's own.
    """
    if not documents:
        return []
    vocabulary = tokenizer.get_vocab()
    written = set.intersection(*(set(MARKER.findall(document.text)) for document in documents[:SEEN]))
    split = sorted(marker for marker in written if marker not in vocabulary)
    faults = []
    if split:
        what = f"the template writes {', '.join(split)}, which the tokenizer splits"
        faults.append(f"model.chat_template: {what}; right only for a base trained that way")
    trained = [token for token, is_trained in zip(documents[0].ids, documents[0].mask, strict=True) if is_trained]
    if trained and not {tokenizer.eos_token_id, *ends} & set(trained):
        stop = tokenizer.convert_ids_to_tokens(trained[-1])
        what = f"answers end with {stop}, at which the base does not stop generating"
        faults.append(f"model.chat_template: {what}. Gates do; serve the artifact with its generation_config.json")
    return faults
