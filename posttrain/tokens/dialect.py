"""The form of calls of tools that a chat template is written for, found by trying it.

Templates disagree: most write the arguments of a call from an object, some from JSON text, and would write an object as
Python does. Some need the id of a call, those of Mistral one of nine letters and digits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any

from posttrain.data.records import Conversation, Message
from posttrain.errors import BadInput

NINE = re.compile(r"[A-Za-z0-9]{9}")
"""The ids of calls in Mistral's templates."""

_NAME, _KEY, _VALUE = "qjxzv", "wkvyb", "zqxjk"
_NO_ID, _ANY_ID, _NINE = None, "call_0", "qjxzvwkvy"


class CallDialect:
    """The calls of a conversation as one template wants them."""

    def __init__(self, write: Callable[[Sequence[Message]], str]) -> None:
        """Take the function that renders messages as they are, and raises BadInput where the template fails."""
        self._write = write

    def adapt(self, chat: Conversation) -> Conversation:
        """Return the conversation with the ids that the template needs: in a call and in its result the same.

        An id that is missing or of another form is made from the former one, or from the place of its call. A result
        without an id answers the first call without a result.
        """
        if not any(message.get("tool_calls") for message in chat.messages) or self._form[0] is _NO_ID:
            return chat
        renamed: dict[str, str] = {}
        waiting: list[str] = []
        messages: list[Message] = []
        for turn, message in enumerate(chat.messages):
            if message.get("tool_calls"):
                calls = [{**call, "id": self._id(call, turn, n)} for n, call in enumerate(message["tool_calls"])]
                for former, call in zip(message["tool_calls"], calls, strict=True):
                    renamed[str(former.get("id"))] = call["id"]
                    waiting.append(call["id"])
                message = {**message, "tool_calls": calls}
            elif message["role"] == "tool" and waiting:
                former_id = message.get("tool_call_id")
                answered = waiting[0] if former_id is None else renamed.get(str(former_id), str(former_id))
                waiting = [each for each in waiting if each != answered] or waiting[:1]
                message = {**message, "tool_call_id": answered}
            messages.append(message)
        return replace(chat, messages=tuple(messages))

    def spell(self, message: Message) -> Message:
        """Return the message with the arguments of its calls as the template wants them: objects, or JSON text."""
        if not message.get("tool_calls") or not self._form[1]:
            return message
        return {**message, "tool_calls": [_in_text(call) for call in message["tool_calls"]]}

    def _id(self, call: Mapping[str, Any], turn: int, number: int) -> str:
        given = call.get("id")
        if isinstance(given, str) and (self._form[0] is _ANY_ID or NINE.fullmatch(given)):
            return given
        made_from = json.dumps([turn, number] if given is None else given)
        return hashlib.sha256(made_from.encode()).hexdigest()[:9]

    @cached_property
    def _form(self) -> tuple[str | None, bool]:
        """The id of the simplest call that the template writes, and whether its arguments are text."""
        for call_id, text in product((_NO_ID, _ANY_ID, _NINE), (False, True)):
            if self._writes(call_id, text):
                return call_id, text
        return _NO_ID, False  # no form is right: the proof of a real call will say so

    def _writes(self, call_id: str | None, text: bool) -> bool:
        """Return whether the template writes a call, and no object as Python does."""
        arguments = {_KEY: _VALUE}
        call: dict[str, Any] = {"type": "function", "function": {"name": _NAME, "arguments": arguments}}
        call = (_in_text(call) if text else call) | ({} if call_id is None else {"id": call_id})
        asked = {"role": "user", "content": "x"}
        try:
            written = self._write([asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except BadInput:
            return False
        quoted_twice = text and json.dumps(json.dumps(arguments)) in written
        return all(word in written for word in (_NAME, _KEY, _VALUE, call_id or "")) and not (
            quoted_twice or str(arguments) in written
        )


def _in_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
