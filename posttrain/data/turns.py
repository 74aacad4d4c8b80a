"""The turns of a conversation in one dialect for all files, and the rules for their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.calls import parse_calls, read_calls
from posttrain.data.records import Message
from posttrain.errors import reject, shown, suggest

ROLES = ("system", "user", "assistant", "tool")
"""The roles of messages."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""The names of the roles under ``from`` in ShareGPT files; the value of a ``function_call`` is JSON."""

_FOLLOWS = {
    "system": ("start",),
    "user": ("start", "system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("assistant", "tool"),
}
"""The roles before each role."""


def make_turn(role: str, content: Any, where: str, name: str) -> Message:
    """Return one message; raises BadInput unless ``content`` is text."""
    return {"role": role, "content": require_text(content, where, name)}


def read_turns(value: Any, where: str, name: str) -> list[Message]:
    """Return the messages in ``value``: one message or a list of them, as role/content or as ShareGPT's from/value.

    ``name`` is their key in the record. Errors quote it and count turns from 1.
    """
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        reject(where, f"{name} must be a list of messages, not {shown(value)}")
    return [_message(entry, where, f"turn {number} of {name}") for number, entry in enumerate(listed, start=1)]


def check_order(messages: Sequence[Message], where: str) -> None:
    """Raise BadInput for turns out of order: a system turn only first, a tool's result only after an assistant turn.

    Turns of one role may follow each other; some templates render such turns.
    """
    last = "start"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if last not in _FOLLOWS[role]:
            after = "begins the conversation" if last == "start" else f"follows {last}"
            reject(
                where,
                f"turn {number} ({role}) {after}",
                "Order: [system,] user, assistant, [tool, assistant,] user, ...",
            )
        last = role


def require_text(content: Any, where: str, name: str) -> str:
    """Return ``content`` if it is text, not blank and valid in UTF-8; raises BadInput otherwise."""
    if not isinstance(content, str):
        reject(where, f"{name}: content must be a string, not {shown(content)}")
    if not content.strip():
        reject(where, f"{name}: content is empty")
    try:
        content.encode()
    except UnicodeEncodeError:
        reject(where, f"{name}: content holds half of a surrogate pair, no character")
    return content


def _message(entry: Any, where: str, name: str) -> Message:
    if not isinstance(entry, Mapping):
        reject(where, f"{name} must be an object with role and content, not {shown(entry)}")
    # Parquet gives every message the keys of all messages: null means absent.
    extra = {key: value for key, value in entry.items() if value is not None}
    if "from" in entry and "role" not in entry:
        role = _known_role(extra.pop("from", None), SHAREGPT_ROLES, where, name)
        value = extra.pop("value", None)
        if role == "function_call":
            extra["tool_calls"], value = parse_calls(value, where, f"{name} ({role})"), None
        return _make_message(SHAREGPT_ROLES[role], value, extra, where, f"{name} ({role})")
    role = _known_role(extra.pop("role", None), ROLES, where, name)
    return _make_message(role, extra.pop("content", None), extra, where, f"{name} ({role})")


def _make_message(role: str, content: Any, extra: dict[str, Any], where: str, name: str) -> Message:
    """Return the message; only calls can replace the content, and only a tool's result can be empty."""
    for key in ("train", "refuses"):
        _check_mark(key, role, extra.get(key), where, name)
    calls = read_calls(extra.pop("tool_calls", None), where, name)
    if calls and role != "assistant":
        reject(where, f"{name}: only an assistant turn can have tool_calls")
    if calls:
        extra["tool_calls"] = calls
    silent = content is None or (isinstance(content, str) and not content.strip())
    if silent and (calls or (role == "tool" and content is not None)):
        return {"role": role, "content": "", **extra}
    return {"role": role, "content": require_text(content, where, name), **extra}


def _check_mark(key: str, role: str, value: Any, where: str, name: str) -> None:
    if value is not None and not isinstance(value, bool):
        reject(where, f"{name}: {key} must be true or false, not {shown(value)}")
    if value and role != "assistant":
        reject(where, f"{name}: only an assistant turn can have {key}: true", f"Remove {key}")


def _known_role(role: Any, known: Sequence[str] | Mapping[str, str], where: str, name: str) -> str:
    if isinstance(role, str) and role in known:
        return role
    meant = SHAREGPT_ROLES.get(str(role).lower())
    options = ", ".join(known)
    fix = f"Did you mean {meant}? Roles: {options}" if meant else suggest(str(role), known)
    reject(where, f"{name} has no role" if role is None else f"{name}: role {role!r} is unknown", fix)
