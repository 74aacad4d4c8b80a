"""The turns of a conversation: one dialect for all files, and the rules that every conversation keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.calls import calls_in, checked_calls
from posttrain.data.records import Message
from posttrain.errors import reject, shown, suggest

ROLES = ("system", "user", "assistant", "tool")
"""The roles that a message can have."""

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
"""What ShareGPT files call the roles in ``from``; a ``function_call`` says its calls, as JSON."""

_FOLLOWS = {
    "system": ("start",),
    "user": ("start", "system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("assistant", "tool"),
}


def turn(role: str, content: Any, where: str, name: str) -> Message:
    """One message; raises BadInput unless ``content`` is text."""
    return {"role": role, "content": checked_text(content, where, name)}


def turns(value: Any, where: str, name: str) -> list[Message]:
    """The messages in ``value``: one message or a list of them, as role/content or as ShareGPT's from/value.

    ``name`` is the key of the record that holds them, for errors, which count turns from 1.
    """
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        reject(where, f"{name} must be a list of messages, not {shown(value)}")
    return [_message(entry, where, f"turn {number} of {name}") for number, entry in enumerate(listed, start=1)]


def check_order(messages: Sequence[Message], where: str) -> None:
    """Refuse turns out of order: a system turn only first, then a user turn; results of tools after an assistant turn.

    Turns of one role may follow each other: whether a template can render that is for the template to say.
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


def checked_text(content: Any, where: str, name: str) -> str:
    """``content`` if it is text with something in it that UTF-8 can hold; raises BadInput otherwise."""
    if not isinstance(content, str):
        reject(where, f"{name}: content must be a string, not {shown(content)}")
    if not content.strip():
        reject(where, f"{name}: content is empty")
    try:
        content.encode()
    except UnicodeEncodeError:
        reject(where, f"{name}: content holds half of a surrogate pair, which is no character")
    return content


def _message(entry: Any, where: str, name: str) -> Message:
    if not isinstance(entry, Mapping):
        reject(where, f"{name} must be an object with role and content, not {shown(entry)}")
    # Parquet gives every message all keys that any message has; an absent one reads as null.
    extra = {key: value for key, value in entry.items() if value is not None}
    if "from" in entry and "role" not in entry:
        role = _known_role(extra.pop("from", None), SHAREGPT_ROLES, where, name)
        value = extra.pop("value", None)
        if role == "function_call":
            extra["tool_calls"], value = calls_in(value, where, f"{name} ({role})"), None
        return _spoken(SHAREGPT_ROLES[role], value, extra, where, f"{name} ({role})")
    role = _known_role(extra.pop("role", None), ROLES, where, name)
    return _spoken(role, extra.pop("content", None), extra, where, f"{name} ({role})")


def _spoken(role: str, content: Any, extra: dict[str, Any], where: str, name: str) -> Message:
    """The message; only calls may stand in for content, and only a tool may say nothing."""
    _check_train(role, extra.get("train"), where, name)
    _check_refuses(role, extra.get("refuses"), where, name)
    calls = checked_calls(extra.pop("tool_calls", None), where, name)
    if calls and role != "assistant":
        reject(where, f"{name}: only an assistant turn can have tool_calls")
    if calls:
        extra["tool_calls"] = calls
    silent = content is None or (isinstance(content, str) and not content.strip())
    if silent and (calls or (role == "tool" and content is not None)):
        return {"role": role, "content": "", **extra}
    return {"role": role, "content": checked_text(content, where, name), **extra}


def _check_train(role: str, train: Any, where: str, name: str) -> None:
    if train is not None and not isinstance(train, bool):
        reject(where, f"{name}: train must be true or false, not {shown(train)}")
    if train and role != "assistant":
        reject(where, f"{name}: train is true, but only assistant turns can be trained", "Remove train")


def _check_refuses(role: str, refuses: Any, where: str, name: str) -> None:
    if refuses is not None and not isinstance(refuses, bool):
        reject(where, f"{name}: refuses must be true or false, not {shown(refuses)}")
    if refuses and role != "assistant":
        reject(where, f"{name}: refuses is true, but only assistant turns can refuse", "Remove refuses")


def _known_role(role: Any, known: Sequence[str] | Mapping[str, str], where: str, name: str) -> str:
    if isinstance(role, str) and role in known:
        return role
    meant = SHAREGPT_ROLES.get(str(role).lower())
    options = ", ".join(known)
    fix = f"Did you mean {meant}? Roles: {options}" if meant else suggest(str(role), known)
    reject(where, f"{name} has no role" if role is None else f"{name}: role {role!r} is unknown", fix)
