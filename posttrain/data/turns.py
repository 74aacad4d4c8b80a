"""The turns of a conversation in one dialect for all files, and the rules for their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.calls import parse_calls, parse_json, read_calls
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

TRAIN_MARKS = (
    "train",
    "training",
    "trainable",
    "should_train",
    "loss",
    "loss_mask",
    "loss_weight",
    "loss_scale",
    "weight",
)
"""Keys of a message by which tools mark it as trained (true or 1) or as context (false or 0)."""

_UNCLEAR_MARKS = ("mask", "masked", "ignore", "train_detail", "training_detail")
"""Keys of a message that may mean either, or a part of a turn."""

MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio")
"""Keys of content other than text."""

_TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a part of content that is text; chat templates write such parts one behind the other."""

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
    value = _parsed(value)
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        reject(where, f"{name} must be a list of messages, not {shown(value)}")
    return [_message(entry, where, f"turn {number} of {name}") for number, entry in enumerate(listed, start=1)]


def _parsed(value: Any) -> Any:
    """Return the list in a text of JSON, as tables of cells hold it; anything else unchanged."""
    parsed = parse_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return parsed if isinstance(parsed, list) else value


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
    """Return ``content`` if it is text or parts of text, not blank and valid in UTF-8; raises BadInput otherwise."""
    content = _joined(content, where, name)
    if not isinstance(content, str):
        reject(where, f"{name}: content must be a string, not {shown(content)}")
    if not content.strip():
        reject(where, f"{name}: content is empty")
    try:
        content.encode()
    except UnicodeEncodeError:
        reject(where, f"{name}: content holds half of a surrogate pair, no character")
    return content


def is_parts(value: Any) -> bool:
    """Return whether a value is the parts of one content, and no list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(e, Mapping) and _is_part(e) for e in value)


def _is_part(entry: Mapping[str, Any]) -> bool:
    return "type" in entry and "role" not in entry and "from" not in entry


def _joined(content: Any, where: str, name: str) -> Any:
    """Return a list of parts of text as one text, and anything else unchanged; raises BadInput for other parts."""
    if not isinstance(content, list) or not content or not all(isinstance(part, Mapping) for part in content):
        return content
    texts = []
    for number, part in enumerate(content, start=1):
        place, kind = f"{name}: part {number} of content", part.get("type")
        if kind in MEDIA or (kind not in _TEXT_PARTS and kind is not None):
            reject(where, f"{place} is of type {shown(kind)}, but only text is trained", "Leave such records out")
        reject_media(part, where, f"{place} ")
        if other := next((key for key, value in part.items() if key not in ("type", "text") and value), None):
            reject(where, f"{place} has {other}, which nothing reads", "Leave it out")
        if not isinstance(part.get("text"), str):
            reject(where, f"{place}: text must be a string, not {shown(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)


def _message(entry: Any, where: str, name: str) -> Message:
    if not isinstance(entry, Mapping):
        reject(where, f"{name} must be an object with role and content, not {shown(entry)}")
    # Parquet gives every message the keys of all messages: null means absent.
    extra = {key: value for key, value in entry.items() if value is not None}
    if "from" in extra and "role" not in extra:
        role = _known_role(extra.pop("from", None), SHAREGPT_ROLES, where, name)
        value = extra.pop("value", None)
        if role == "function_call":
            extra["tool_calls"], value = parse_calls(value, where, f"{name} ({role})"), None
        return _make_message(SHAREGPT_ROLES[role], value, extra, where, f"{name} ({role})")
    if extra.get("role") == "function":  # OpenAI's former name of a tool
        extra["role"] = "tool"
    role = _known_role(extra.pop("role", None), ROLES, where, name)
    return _make_message(role, extra.pop("content", None), extra, where, f"{name} ({role})")


def _make_message(role: str, content: Any, extra: dict[str, Any], where: str, name: str) -> Message:
    """Return the message; only calls can replace the content, and only a tool's result can be empty."""
    reject_media(extra, where, f"{name}: ")
    _read_marks(extra, role, where, name)
    _check_mark("refuses", role, extra.get("refuses"), where, name)
    if (former := extra.pop("function_call", None)) is not None:
        if extra.get("tool_calls"):
            reject(where, f"{name} has function_call and tool_calls", "Keep tool_calls")
        extra["tool_calls"] = [former]
    calls = read_calls(extra.pop("tool_calls", None), where, name)
    if calls and role != "assistant":
        reject(where, f"{name}: only an assistant turn can have tool_calls")
    if calls:
        extra["tool_calls"] = calls
    content = _joined(content, where, name)
    silent = content is None or (isinstance(content, str) and not content.strip())
    if silent and (calls or (role == "tool" and content is not None)):
        return {"role": role, "content": "", **extra}
    return {"role": role, "content": require_text(content, where, name), **extra}


def reject_media(row: Mapping[str, Any], where: str, name: str = "") -> None:
    """Raise BadInput for images, sound or films in a record or a message: only text is trained."""
    if found := next((key for key in MEDIA if row.get(key)), None):
        fix = f"Leave such records out, or set the key aside with columns: {{unused: {found}}}"
        reject(where, f"{name}has {found}, but only text is trained", fix if not name else "Leave such records out")


def read_mark(value: Any) -> bool | None:
    """Return a mark of training as true or false; None for a value that is neither."""
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _read_marks(extra: dict[str, Any], role: str, where: str, name: str) -> None:
    """Replace every mark of training in ``extra`` by ``train: false``, or by nothing for a trained turn.

    Raises:
        BadInput: A mark is neither true nor false, contradicts another, or trains another turn than an answer.
    """
    if unclear := next((key for key in _UNCLEAR_MARKS if extra.get(key) not in (None, [])), None):
        reject(where, f"{name}: {unclear} may mean trained or not", "Mark the turn train: true or train: false")
    given = {key: extra.pop(key) for key in TRAIN_MARKS if key in extra}
    read = {key: read_mark(value) for key, value in given.items()}
    for key, value in given.items():
        if read[key] is None:
            what = f"{name}: {key} must be true or false, not {shown(value)}"
            reject(where, what, "An answer is trained (true or 1) or context (false or 0)")
    if len(set(read.values())) > 1:
        reject(where, f"{name}: {' and '.join(given)} contradict each other", "Keep one of them")
    for key, value in read.items():
        if value and role != "assistant":
            reject(where, f"{name}: only an assistant turn can have {key}: {str(given[key]).lower()}", f"Remove {key}")
        if not value:
            extra["train"] = False


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
