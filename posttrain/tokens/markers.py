"""Signs that a chat template belongs to another family of models than the tokenizer and the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.tokens.chat import Rendered

MARKER = re.compile(r"<[|｜][^\s<>]{1,40}?[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
"""How families write the borders of turns: ChatML, Llama 3, Zephyr, Phi, DeepSeek; Gemma; Mistral."""
SEEN = 16
"""Documents that are looked at: what stands in all of them is the template's, not a content's."""


def family_faults(tokenizer: Any, documents: Sequence[Rendered], ends: Iterable[int | None]) -> list[str]:
    """Markers of the template that are no tokens, and a stop token at which generation does not stop.

    ``documents`` are conversations that are trained; ``ends`` are the tokens at which the model's generation settings
    stop, besides the tokenizer's own end.
    """
    if not documents:
        return []
    vocabulary = tokenizer.get_vocab()
    written = set.intersection(*(set(MARKER.findall(document.text)) for document in documents[:SEEN]))
    split = sorted(marker for marker in written if marker not in vocabulary)
    faults = []
    if split:
        what = f"the template writes {', '.join(split)}, which the tokenizer cuts into pieces"
        faults.append(f"model.chat_template: {what}; right only for a base that was trained on it that way")
    trained = [token for token, is_trained in zip(documents[0].ids, documents[0].mask, strict=True) if is_trained]
    if trained and not {tokenizer.eos_token_id, *ends} & set(trained):
        stop = tokenizer.convert_ids_to_tokens(trained[-1])
        what = f"answers end with {stop}, but generation does not stop there and will run on"
        faults.append(f"model.chat_template: {what}. Add its id to eos_token_id in the model's generation_config.json")
    return faults
