"""Records as the stages see them, the same for all shapes of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}`` with further keys for the chat template.

Calls of tools are ``tool_calls: [{"type": "function", "function": {"name": "...", "arguments": {...}}}]``; beside them
content may be empty. On an assistant turn, ``train: false`` makes it context, and ``refuses`` marks an answer
as declining the request (true) or not (false). The template sees neither key.
"""

OUR_KEYS = ("train", "refuses")
"""Keys of a message for posttrain, hidden from the template."""

Tool = Mapping[str, Any]
"""The definition of a tool, in the form of chat templates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The source of a record."""

    number: int
    """Its place in the recipe's list of sources, from 0."""
    path: str
    """File, folder or hub name of the source."""
    share: float = 0.0
    """Its share of all tokens of the stage; 0 when the recipe gives none and takes all records."""
    weight: float = 1.0
    """Times that an epoch sees each of its records."""


UNKNOWN = Origin(number=0, path="data")
"""The origin of records from outside the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat whose assistant turns are trained."""

    messages: tuple[Message, ...]
    """Turns, the first one first."""
    where: str
    """``file:line`` (JSONL) or ``file[index]``, for errors."""
    tools: tuple[Tool, ...] = ()
    """The tools on offer in the prompt."""
    origin: Origin = UNKNOWN
    """Source of the record."""
    unread: tuple[str, ...] = ()
    """Keys of its row that nothing reads."""
    group: str = ""
    """Value of the key that ``columns`` renames to group, for balance; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Raw text; every token is trained."""

    text: str
    """The raw text."""
    where: str
    """Place of the record, for errors."""
    origin: Origin = UNKNOWN
    """Source of the record."""
    unread: tuple[str, ...] = ()
    """Keys of its row that nothing reads."""
    group: str = ""
    """Value of the key that ``columns`` renames to group, for balance; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A prompt with a preferred and a rejected answer."""

    prompt: tuple[Message, ...]
    """Turns before the answers."""
    chosen: tuple[Message, ...]
    """Turns of the preferred answer."""
    rejected: tuple[Message, ...]
    """Turns of the rejected answer."""
    where: str
    """Place of the record, for errors."""
    tools: tuple[Tool, ...] = ()
    """Tools on offer in the prompt."""
    origin: Origin = UNKNOWN
    """Source of the record."""
    unread: tuple[str, ...] = ()
    """Keys of its row that nothing reads."""
    group: str = ""
    """Value of the key that ``columns`` renames to group, for balance; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """A prompt with one answer, judged on its own."""

    prompt: tuple[Message, ...]
    """Turns before the answer."""
    completion: tuple[Message, ...]
    """Turns of the answer."""
    label: bool
    """True for a good answer."""
    where: str
    """Place of the record, for errors."""
    tools: tuple[Tool, ...] = ()
    """Tools on offer in the prompt."""
    origin: Origin = UNKNOWN
    """Source of the record."""
    unread: tuple[str, ...] = ()
    """Keys of its row that nothing reads."""
    group: str = ""
    """Value of the key that ``columns`` renames to group, for balance; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt without an answer in it, and its right answers: the model answers, a gate or a reward scores."""

    prompt: tuple[Message, ...]
    """Turns, the last one of the user."""
    where: str
    """Place of the record, for errors."""
    answers: tuple[Any, ...] = ()
    """Right answers, any of which will do; none where no reward compares."""
    match: str = "exact"
    """The comparison of a text with an answer: exact, contains, regex, numeric or json."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Values for rewards, such as ``format`` and ``max_characters``."""
    origin: Origin = UNKNOWN
    """Source of the record."""
    unread: tuple[str, ...] = ()
    """Keys of its row that nothing reads."""
    group: str = ""
    """Value of the key that ``columns`` renames to group, for balance; empty without one."""


Document = Conversation | Text
"""A record for a stage of documents."""

Record = Document | Preference | Feedback | Question
"""A training record of any shape."""
