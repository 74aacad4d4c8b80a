"""A second proof of the mask, from the tokens alone: the trained ones must be the answers with their stop tokens.

``chat`` builds the mask from characters; this file reads it back without the template, so that one error cannot hide in
both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from posttrain.data.records import Conversation, Document, Message, Text
from posttrain.tokens.chat import Rendered
from posttrain.tokens.codec import decode, without_space

_TAG = re.compile(r"^<\w+>")
"""A tag at the beginning of an answer, such as ``<think>``; untrained when the generation prompt writes it."""


class MaskProof:
    """The second proof, with a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the tokenizer behind the tokens, with all tokens that will be added to it."""
        self._tokenizer = tokenizer
        # asked once: some tokenizers have hundreds, and list them in a tenth of the time of a whole record
        self._special = {key for key, token in tokenizer.added_tokens_decoder.items() if token.special}

    def fault(self, record: Document, rendered: Rendered, *, last_only: bool = False) -> str | None:
        """Return the fault of the mask of ``rendered``, judged by its tokens alone; None for a sound mask."""
        if isinstance(record, Text):
            return self._fault_of_text(record, rendered)
        return self._fault_of_answers(record, rendered, last_only)

    def _fault_of_text(self, record: Text, rendered: Rendered) -> str | None:
        """Return the fault of a text: all tokens but the first must be trained, and the last must end it."""
        if not all(rendered.mask[1:]):
            return "not every token of the text is trained"
        if rendered.ids[-1] != self._tokenizer.eos_token_id:
            return "the end-of-sequence token is not trained"
        around = {*self._tokenizer.all_special_ids}
        said = _bare(self._tokenizer, [token for token in rendered.ids if token not in around])
        return None if said == without_space(record.text) else "its tokens are not the text"

    def _fault_of_answers(self, record: Conversation, rendered: Rendered, last_only: bool) -> str | None:
        """Return the fault of a conversation: every answer must be trained whole with its stop token, and nothing else.

        Each run of trained tokens must end with an assistant turn's content and then special tokens only; calls of
        tools may come between the two. Contents of users and the system must occur in untrained tokens.
        """
        tokenizer, special = self._tokenizer, self._special
        answers = [message for message in record.messages if message["role"] == "assistant"]
        answers = [message for message in (answers[-1:] if last_only else answers) if message.get("train", True)]
        runs, others = _runs(rendered)
        if len(runs) != len(answers):
            return f"{len(runs)} runs of trained tokens for {len(answers)} answers"
        for answer, run in zip(answers, runs, strict=True):
            end = len(run)
            while end and (run[end - 1] in special or not _bare(tokenizer, run[end - 1 : end])):
                end -= 1
            content = answer["content"]
            if not special & set(run[end:]):
                return f"the stop token after {content!r} is not trained"
            if not _is_whole(content, _text_before(tokenizer, run, end), calls=bool(answer.get("tool_calls"))):
                return f"{content!r} is not trained as a whole"
        last = max(
            (index for index, message in enumerate(record.messages) if message["role"] == "assistant"), default=0
        )
        asked = _trained_prompt(record.messages[: last + 1 if last_only else None], rendered, others, tokenizer)
        return None if asked is None else f"{asked!r} occurs in trained tokens only, but the model must not write it"


def _trained_prompt(
    messages: Sequence[Message], rendered: Rendered, runs: Sequence[list[int]], tokenizer: Any
) -> str | None:
    """Return the first content of a user or system turn that occurs in the text but not in its untrained ``runs``."""
    untrained = [decode(tokenizer, run) for run in runs]
    bare: list[str] = []
    for message in messages:
        said = str(message["content"]).strip() if message["role"] in ("user", "system") else ""
        if any(said in text for text in untrained) or not (said := without_space(said)):
            continue
        bare = bare or [without_space(text) for text in untrained]
        # the whole is decoded only for a content that is nowhere else
        if not any(said in text for text in bare) and said in _bare(tokenizer, rendered.ids):
            return str(message["content"])
    return None


def _is_whole(content: str, said: str, *, calls: bool) -> bool:
    """Return whether an answer's text is its content, perhaps after a lead; with ``calls``, whether it holds it."""
    # Compared as they are first: most of the time goes into texts without whitespace. A mark at the beginning could
    # belong to the character before it, which only the normalised texts show.
    if content.strip()[:1].isascii() and said.rstrip().endswith(content.strip()):
        return True
    bare, wanted = without_space(said), without_space(content)
    return wanted in bare if calls else bare.endswith(wanted) or bare == _TAG.sub("", wanted, count=1)


def _runs(rendered: Rendered) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of each run of trained tokens, and of each run of others."""
    ids, mask = rendered.ids, rendered.mask
    trained: list[list[int]] = []
    others: list[list[int]] = []
    start = 0
    while start < len(mask):
        end = _end_of_run(mask, start)
        (trained if mask[start] else others).append(ids[start:end])
        start = end
    return trained, others


def _end_of_run(mask: list[bool], start: int) -> int:
    try:
        return mask.index(not mask[start], start)
    except ValueError:  # the last run
        return len(mask)


def _text_before(tokenizer: Any, run: list[int], end: int) -> str:
    """Return the text of ``run[:end]``, from that of the whole run where this one ends with the text of the rest."""
    text, rest = decode(tokenizer, run), decode(tokenizer, run[end:])
    return text[: len(text) - len(rest)] if text.endswith(rest) else decode(tokenizer, run[:end])


def _bare(tokenizer: Any, ids: list[int]) -> str:
    return without_space(decode(tokenizer, ids))
