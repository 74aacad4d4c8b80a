"""The texts that a chat template writes for conversations, within limits of time and size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from posttrain.data.calls import words
from posttrain.data.records import OUR_KEYS, Conversation, Message, Tool
from posttrain.errors import reject
from posttrain.host.time_limit import time_limit
from posttrain.tokens.dialect import CallDialect
from posttrain.tokens.history import Historian, History

SECONDS = 5
"""Computing time of a template for one conversation; templates of published models take a thousandth."""
SIZE, SIZE_PER_CHARACTER = 1_000_000, 10
"""Largest text of a template in characters, in any case and for every character of the conversation."""

_FAILURES = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip
"""The exceptions of a failing template."""

OTHER_TEMPLATE = "Use another chat template: model.chat_template=FILE"


class ChatTexts:
    """The chat template of a tokenizer, as a writer of texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._dialect = CallDialect(lambda messages: self._write(messages, "model.chat_template"))
        self.adapt = self._dialect.adapt
        """Gives a conversation the ids of calls that the template needs."""
        self._historian = Historian(tokenizer)
        self._history: History | None = None

    def render(self, chat: Conversation, *, prompt: bool = False, template: str | None = None) -> str:
        """Return the text of a conversation; with ``prompt``, followed by the generation prompt.

        Raises:
            BadInput: The template fails, takes too long or writes too much.
        """
        if self._history is not None and template is None:
            known = self._history.find(chat.messages, prompt=prompt)
            if known is not None:
                return known
        return self._write(
            [self._dialect.spell(message) for message in chat.messages],
            chat.where,
            add_generation_prompt=prompt,
            chat_template=template,
            tools=_as_dicts(chat.tools),
        )

    @contextlib.contextmanager
    def following(self, chat: Conversation, text: str) -> Iterator[bool]:
        """Know the beginnings of ``chat``, rendered as ``text``, inside; yields False where each is rendered.

        The history of a conversation is then rendered once, not three times for each of its answers.
        """
        messages = [_without_our_keys(self._dialect.spell(message)) for message in chat.messages]
        with time_limit(SECONDS):
            history = self._historian.follow(chat.messages, messages, _as_dicts(chat.tools), text)
        if history is not None and history.prompt not in self._historian.proven:
            earlier = replace(chat, messages=chat.messages[:-1])
            if self.render(earlier, prompt=True) == history.find(earlier.messages, prompt=True):
                self._historian.proven.add(history.prompt)
            else:
                history = None
        self._history = history
        try:
            yield history is not None
        finally:
            self._history = None

    def _write(self, listed: Sequence[Message], where: str, tools: Any = None, **options: Any) -> str:
        """Return the text of messages as they are."""
        messages = list(map(_without_our_keys, listed))
        try:
            with time_limit(SECONDS):
                text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, tools=tools, **options))
            text.encode()
        except TimeoutError:
            reject(where, f"the chat template takes longer than {SECONDS} s", OTHER_TEMPLATE)
        except _FAILURES as error:
            why = str(error) or type(error).__name__
            reject(where, f"the chat template cannot render the conversation: {why}", OTHER_TEMPLATE)
        if len(text) > SIZE and len(text) > SIZE_PER_CHARACTER * sum(
            len(str(word)) for word in words([messages, tools])
        ):
            reject(where, f"the chat template writes {len(text):,} characters for it", OTHER_TEMPLATE)
        return text


def _without_our_keys(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in OUR_KEYS}


def _as_dicts(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    return [dict(tool) for tool in tools] or None
