"""Records as the stages see them, whatever shape their file had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}`` and whatever else the chat template reads.

Calls of tools are ``tool_calls: [{"type": "function", "function": {"name": "...", "arguments": {...}}}]``; beside them
content may be empty. ``train: false`` on an assistant turn keeps it as context; the template is not shown this key.
"""

Tool = Mapping[str, Any]
"""The definition of a tool, as the chat template reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat whose assistant turns are trained."""

    messages: tuple[Message, ...]
    where: str
    """``file:line`` (JSONL) or ``file[index]``, for messages."""
    tools: tuple[Tool, ...] = ()
    """The tools that the prompt offers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt with a preferred and a rejected answer."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    where: str
    tools: tuple[Tool, ...] = ()


Record = Conversation | Preference
