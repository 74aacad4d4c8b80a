"""Prompts as ids, and ids as text: by the artifact's own tokenizer and template, as in training and in its gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.records import Conversation
from posttrain.errors import BadInput, reject
from posttrain.tokens.chat import ChatRenderer
from posttrain.tokens.spans import Template

REPLACEMENT = "�"
"""Sign for bytes that are no character yet."""
ROLES = ("system", "user", "assistant")


class Prompter:
    """The texts of one model."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer with its pinned template."""
        self.tokenizer = tokenizer
        self._template = Template(tokenizer)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation, up to where the answer begins.

        Raises BadInput when a message holds a special token, which would fake a turn, or when the template fails.
        """
        for number, message in enumerate(messages):
            if forged := self._template.control.search(message["content"]):
                what = f"holds the special token {forged[0]!r}, which would fake an end of turn or a header"
                reject(f"messages[{number}].content", what, "Leave it out")
        chat = Conversation(messages=tuple(dict(message) for message in messages), where="messages")
        text = self._template.render(chat, prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def plain(self, text: str) -> list[int]:
        """Return the ids of a text, with the tokens that the tokenizer puts around one, but for an end."""
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token(self, token: int) -> str:
        """Return the text of one token, special ones included."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def trained(self, messages: Sequence[Mapping[str, str]], answer: str) -> list[int] | None:
        """Return the ids that training has before this answer; None when its template takes no such conversation."""
        turns = (*map(dict, messages), {"role": "assistant", "content": answer})
        try:
            rendered = ChatRenderer(self.tokenizer).conversation(
                Conversation(messages=turns, where="probe"), last_only=True
            )
        except BadInput:
            return None
        return rendered.ids[: rendered.mask.index(True)]


class Text:
    """The text of an answer while its tokens come, cut before the stop text that is complete first."""

    def __init__(self, prompter: Prompter, stops: Sequence[str] = ()) -> None:
        self._prompter, self._stops = prompter, stops
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # the last ids decoded, and the first of those not yet
        self._held = ""
        self.stopped = False
        """True once a stop text has come; it and all after it are no part of the text."""

    def hold(self, token: int) -> None:
        """Take a token whose text nobody needs before the end."""
        self._ids.append(token)

    def add(self, token: int) -> str:
        """Return the text that is certain with this token."""
        self._ids.append(token)
        fresh = self._fresh()
        if not fresh or fresh.endswith(REPLACEMENT):  # perhaps the first bytes of a character
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(fresh, last=False)

    def end(self) -> str:
        """Return the rest of the text."""
        return "" if self.stopped else self._release(self._fresh(), last=True)

    def _fresh(self) -> str:
        known = self._prompter.text(self._ids[self._start : self._read])
        return self._prompter.text(self._ids[self._start :])[len(known) :]

    def _release(self, fresh: str, *, last: bool) -> str:
        text, self._held = self._held + fresh, ""
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, place = min(found)
            return text[:place]
        if not last and (kept := max((_overlap(text, stop) for stop in self._stops), default=0)):
            text, self._held = text[:-kept], text[-kept:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
