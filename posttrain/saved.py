"""Files that posttrain has saved, read back: their content in its type, or ArtifactDamaged with the path.

Whatever lies at a path, reading it ends: a pipe, a folder, bytes that are no text, JSON of a stranger.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import stat
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from posttrain.disk import explain_error
from posttrain.errors import ArtifactDamaged, shown

T = TypeVar("T")
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
"""Names of what can lie at a path in a file's place."""
DEEPEST = 50
"""Levels of a JSON value in a file of ours; the settings of a stage have a few."""
TYPE_NAMES = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}


def read_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file; ``errors`` is the treatment of bytes that are not UTF-8, as ``bytes.decode`` has it.

    Raises ArtifactDamaged when it is no file or cannot be read, FileNotFoundError when there is none.
    """
    try:
        require_file(path)
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            _require_regular(path, os.fstat(descriptor).st_mode)
            return stream.read().decode("utf-8", errors)
    except FileNotFoundError:
        if path.is_symlink():
            raise ArtifactDamaged(f"{path} is a link to nothing") from None
        raise
    except OSError as error:
        if explain_error(error, path) is not None:  # of the disk, or of permissions
            raise
        raise ArtifactDamaged(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ArtifactDamaged(f"{path} is damaged: {error}") from None


def require_file(path: Path) -> None:
    """Raise ArtifactDamaged when a folder, a pipe or a device lies at ``path``."""
    with contextlib.suppress(FileNotFoundError):
        _require_regular(path, path.stat().st_mode)


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ArtifactDamaged(f"{path} is {KINDS.get(stat.S_IFMT(mode), 'no file')}, where a file belongs")


def read_json(path: Path) -> Any:
    """Return the JSON value in a file. Raises ArtifactDamaged when there is none, and FileNotFoundError."""
    value = parse_json(read_text(path), str(path))
    if _is_deep(value):
        raise ArtifactDamaged(f"{path} is damaged: it is nested more than {DEEPEST} deep")
    return value


def read_as(kind: type[T], path: Path) -> T:
    """Return the content of a JSON file as a ``kind``; see ``as_kind``."""
    return as_kind(kind, read_json(path), str(path))


def read_lines(kind: type[T], path: Path) -> list[T]:
    """Return every line of a JSONL file as a ``kind``; an error names the first bad line."""
    places = ((f"{path}:{number}", line) for number, line in enumerate(lines_of(read_text(path)), start=1))
    return [as_kind(kind, parse_json(line, place), place) for place, line in places]


def lines_of(text: str) -> list[str]:
    """Split a JSONL text at newlines only: ``splitlines`` would also split at U+2028 inside a JSON string."""
    return text.removesuffix("\n").split("\n") if text else []


def parse_json(text: str, place: str) -> Any:
    """Return the value of a JSON text. Raises ArtifactDamaged naming the place when it is none."""
    try:
        return json.loads(text, parse_constant=_reject_constant, parse_float=_parse_float)
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not text.strip() else str(error) or type(error).__name__
        raise ArtifactDamaged(f"{place} is damaged: it is no JSON: {reason}") from None


def _reject_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _parse_float(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _reject_constant(text)


def _is_deep(value: Any) -> bool:
    """Return whether a value is nested so deep that functions which call themselves may fail on it."""
    level = [value]
    for _ in range(DEEPEST):
        level = [item for each in level if isinstance(each, dict | list) for item in _items(each)]
    return bool(level)


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def as_kind(kind: type[T], value: Any, place: str) -> T:
    """Return a JSON value as a ``kind``: a dataclass, or any type that ``convert`` knows.

    Raises ArtifactDamaged naming the place when a field is missing, strange or of another type.
    """
    try:
        return cast("T", convert(kind, value))
    except (ValueError, RecursionError) as error:
        raise ArtifactDamaged(f"{place} is damaged: {error}") from None


def convert(kind: Any, value: Any, name: str = "") -> Any:
    """Return a JSON value as a dataclass, list, tuple, mapping, choice, enum, text, number or None.

    Raises ValueError naming the field that is missing, strange or of another type.
    """
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any or kind is object:
        return value
    if is_dataclass(kind):
        return _convert_fields(kind, value, name)
    if origin in (types.UnionType, typing.Union):
        others = [option for option in arguments if option is not type(None)]
        return None if value is None and len(others) < len(arguments) else convert(others[0], value, name)
    if origin is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return _convert_choice(kind, value, name)
    if origin in (list, Sequence, tuple):
        items = _require(value, list, "a list", name)
        kinds = arguments if origin is tuple and arguments[-1:] != (...,) else (*arguments, Any)[:1] * len(items)
        if len(kinds) != len(items):
            raise ValueError(f"{name.lstrip('.')} has {len(items)} items, not {len(kinds)}")
        made = [convert(kind, item, f"{name}[{at}]") for at, (kind, item) in enumerate(zip(kinds, items, strict=True))]
        return tuple(made) if origin is tuple else made
    if origin in (dict, Mapping):
        items = _require(value, dict, "a mapping", name)
        key_kind, item_kind = arguments or (Any, Any)
        return {
            _convert_key(key_kind, key, name): convert(item_kind, item, f"{name}.{key}") for key, item in items.items()
        }
    if kind is float and type(value) is int:
        value = _as_float(value, name)
    found = _require(value, kind, TYPE_NAMES.get(kind, str(kind)), name)
    if kind is float and not math.isfinite(found):
        raise ValueError(f"{name.lstrip('.')} is {value}, not a finite number")
    return found


def plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as JSON values: the opposite of ``convert``."""
    return dict(asdict(config, dict_factory=lambda items: {key: _plain_value(value) for key, value in items}))


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_value(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value


def _convert_fields(kind: Any, value: Any, name: str) -> Any:
    given = _require(value, dict, "a mapping", name)
    wanted = _hints(kind)
    needed = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    place = f" in {name.lstrip('.')}" if name else ""
    if missing := sorted(needed - given.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}{place}")
    if strange := sorted(given.keys() - wanted.keys()):
        raise ValueError(f"it has the unknown {shown(strange[0])}{place}")
    return kind(**{key: convert(wanted[key], item, f"{name}.{key}") for key, item in given.items()})


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _convert_choice(kind: Any, value: Any, name: str) -> Any:
    options = typing.get_args(kind) or tuple(member.value for member in kind)
    if not any(type(option) is type(value) and option == value for option in options):
        listed = ", ".join(map(str, options))
        raise ValueError(f"{name.lstrip('.')} is {shown(value)}, not one of {listed}")
    return value if typing.get_args(kind) else kind(value)


def _convert_key(kind: Any, key: str, name: str) -> Any:
    if kind is not int:
        return key
    try:
        return int(key)
    except ValueError:
        raise ValueError(f"{name.lstrip('.')} has the key {shown(key)}, not a whole number") from None


def _as_float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name.lstrip('.')} is beyond all floating-point numbers") from None


def _require(value: Any, kind: type, what: str, name: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name.lstrip('.') or 'it'} is {shown(value)}, not {what}")
    return value
