"""Tools and their calls in one dialect for all files, and the words of a call in a rendered text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from posttrain.data.records import Message, Tool
from posttrain.errors import reject, shown

_CALL_KEYS = ("id", "type", "index", "function", "name", "arguments")
"""Keys of a call and of its function."""


def read_tools(value: Any, where: str) -> tuple[Tool, ...]:
    """Return the tools of a record, from a list of definitions or the same as JSON text.

    Raises:
        BadInput: ``value`` is neither, or a tool has no name.
    """
    listed = parse_json(value)
    if listed in (None, ""):
        return ()
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        reject(where, f"tools must be a list of definitions, not {shown(value)}")
    for number, tool in enumerate(listed, start=1):
        if not isinstance(_function(tool).get("name"), str):
            reject(where, f"tool {number} has no name")
    return tuple(listed)


def read_calls(value: Any, where: str, name: str) -> list[dict[str, Any]]:
    """Return the calls of a message as ``{"type": "function", "function": {"name", "arguments"}}``, arguments parsed.

    Chat templates are written for this form. Files differ: arguments are objects or JSON text, and the outer object
    may be missing.

    Raises:
        BadInput: A call has no name, its arguments are no object, or two calls have one id.
    """
    if value is not None and not isinstance(value, list):
        reject(where, f"{name}: tool_calls must be a list, not {shown(value)}")
    calls = [_read_call(call, where, f"{name}: call {number}") for number, call in enumerate(value or [], start=1)]
    known = [call["id"] for call in calls if call.get("id") is not None]
    if repeated := [key for key in known if known.count(key) > 1]:
        reject(
            where, f"{name}: two calls have the id {shown(repeated[0])}", "Give every call of a turn an id of its own"
        )
    return calls


def parse_calls(value: Any, where: str, name: str) -> list[Any]:
    """Return the calls in the content of a turn: one object with name and arguments, a list of them, or their JSON.

    Raises:
        BadInput: ``value`` is none of these, or an empty list.
    """
    parsed = parse_json(value)
    calls = [parsed] if isinstance(parsed, Mapping) else parsed
    if not isinstance(calls, list) or not calls:
        reject(where, f"{name} must be a call, as JSON with name and arguments, not {shown(value)}")
    return calls


def check_results(messages: Sequence[Message], where: str) -> None:
    """Raise BadInput for a tool's result whose call id no earlier turn has; calls without ids match any result."""
    made: list[Any] = []
    for number, message in enumerate(messages, start=1):
        made += [call["id"] for call in message.get("tool_calls") or () if call.get("id") is not None]
        answered = message.get("tool_call_id")
        if message["role"] == "tool" and made and answered is not None and answered not in made:
            reject(where, f"turn {number} (tool) answers the call {shown(answered)}, which no earlier turn makes")


def called_functions(message: Message) -> Sequence[Mapping[str, Any]]:
    """Return the functions called by a message, each with ``name`` and ``arguments``."""
    return [call["function"] for call in message.get("tool_calls") or ()]


def rename_call(message: Message, name: str) -> Message:
    """Return the message with another name for the first function it calls."""
    first, *others = message["tool_calls"]
    return {**message, "tool_calls": [{**first, "function": {**first["function"], "name": name}}, *others]}


def disguise_calls(message: Message) -> tuple[Message, list[str]]:
    """Return the message with a new word for every name, key and scalar of its calls, and the new words.

    Each word is invented and unique: a template that writes all of them writes the whole calls.
    """
    taken: list[str] = []
    calls = [
        {**call, "function": {"name": _new_word(taken), "arguments": _in_words(call["function"]["arguments"], taken)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}, taken


def tool_names(tools: Sequence[Tool]) -> list[str]:
    """Return the names of the functions in tool definitions."""
    return [_function(tool)["name"] for tool in tools]


def words(value: Any) -> Iterator[Any]:
    """Yield every key and every scalar in nested lists and objects."""
    if isinstance(value, str):  # nearly every one: the question after a Mapping takes ten times as long
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from words(item)
    else:
        yield value


def occurs_in(word: Any, text: str) -> bool:
    """Return whether ``text`` holds a word of a call, plain or in one of its JSON spellings."""
    spellings = [json.dumps(word), json.dumps(word, ensure_ascii=False)]
    if isinstance(word, str):
        spellings = [spelling[1:-1] for spelling in spellings]
    return any(spelling in text for spelling in (str(word), *spellings))


def core_of(message: Message) -> str:
    """Return the part of a message to find in the text: its content, or the name of the first function it calls."""
    calls = called_functions(message)
    return str(calls[0]["name"] if calls else message["content"]).strip()


def with_content(message: Message, sentinel: str) -> Message:
    """Return the message with ``sentinel`` in place of its core."""
    return rename_call(message, sentinel) if called_functions(message) else {**message, "content": sentinel}


def is_written(message: Message, text: str) -> bool:
    """Return whether ``text`` holds a message; of an answer only its calls, since earlier thoughts may be dropped."""
    if message["role"] == "assistant":
        return all(call["name"] in text for call in called_functions(message))
    content = message["content"].strip()
    return content in text or (message["role"] == "tool" and occurs_in(content, text))


def _read_call(call: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        reject(where, f"{name} must be an object, not {shown(call)}")
    function = _function(call)
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        reject(where, f"{name} names no function")
    unknown = sorted(key for key in {**call, **function} if key not in _CALL_KEYS)
    if unknown and function.get("arguments") is None:
        reject(where, f"{name} has no arguments, but {unknown[0]}, which nothing reads", "Rename it to arguments")
    arguments = parse_json(function.get("arguments"))
    if arguments is not None and not isinstance(arguments, Mapping):
        reject(where, f"{name}: arguments must be an object, not {shown(arguments)}")
    outer = {key: value for key, value in call.items() if key not in ("name", "arguments") and value is not None}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments or {}}}


def _function(definition: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = definition.get("function")
    if isinstance(inner, Mapping):
        return inner
    return {key: definition[key] for key in ("name", "arguments") if key in definition}


def _in_words(value: Any, taken: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {_new_word(taken): _in_words(item, taken) for item in value.values()}
    if isinstance(value, list | tuple):
        return [_in_words(item, taken) for item in value]
    return _new_word(taken)


def _new_word(taken: list[str]) -> str:
    taken.append(f"qjxzv{len(taken)}wkvyb")
    return taken[-1]


def parse_json(value: Any) -> Any:
    """Return the value of JSON text; return anything else, and text without readable JSON, unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # no JSON, or too long a number or too deep a list for Python
        return value
