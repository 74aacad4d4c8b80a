"""Records as the stages see them, whatever shape their file had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}`` and whatever else the chat template reads.

Calls of tools are ``tool_calls: [{"type": "function", "function": {"name": "...", "arguments": {...}}}]``; beside them
content may be empty. ``train: false`` on an assistant turn keeps it as context, and ``refuses`` says whether it is a
refusal; the template is shown neither key.
"""

Tool = Mapping[str, Any]
"""The definition of a tool, as the chat template reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The source that a record came from."""

    number: int
    """Its place in the recipe's list of sources, from 0."""
    path: str
    share: float = 0.0
    """Its share of the tokens of the mix; 0 when the recipe gives none, and all records are taken."""


UNKNOWN = Origin(number=0, path="data")
"""The origin of records that did not come from a source of the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat whose assistant turns are trained."""

    messages: tuple[Message, ...]
    where: str
    """``file:line`` (JSONL) or ``file[index]``, for messages."""
    tools: tuple[Tool, ...] = ()
    """The tools that the prompt offers."""
    origin: Origin = UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Raw text, every token of which is trained."""

    text: str
    where: str
    origin: Origin = UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt with a preferred and a rejected answer."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    where: str
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """A prompt with one answer that was judged on its own."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    """Whether the answer was judged good."""
    where: str
    tools: tuple[Tool, ...] = ()


Document = Conversation | Text
"""What a stage that asks for documents gets."""

Record = Document | Preference | Feedback
