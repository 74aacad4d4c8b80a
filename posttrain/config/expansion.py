"""The size of settings with their interpolations resolved, found without resolving any."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import reject

MOST_DEPTH = 30
MOST_KEY = 200
"""Characters of one key."""
MOST_RESOLVED = 5_000
"""Interpolations of a recipe, each as often as it has to be resolved."""
MOST_RESOLVED_CHARACTERS = 1_000_000
INNERMOST = re.compile(r"\$\{([^${}]*)\}")


def check_interpolations(raw: Mapping[Any, Any], name: str) -> None:
    """Raise BadInput for values that refer to themselves, or that grow beyond all bounds when they are resolved."""
    expansion = _Expansion(raw, name)
    references = characters = 0
    for path in [(str(key),) for key in raw]:
        more_references, more_characters = expansion.size(path, ())
        references, characters = references + more_references, characters + more_characters
        if references > MOST_RESOLVED or characters > MOST_RESOLVED_CHARACTERS:
            what = "grows beyond all bounds when its interpolations are resolved"
            reject(f"{name}: {path[0]}", what, "Write the values themselves")


@dataclass
class _Expansion:
    """The size of values with their interpolations resolved, found without resolving any."""

    raw: Any
    name: str
    """Name of the recipe or gate."""
    known: dict[tuple[str, ...], tuple[int, int]] = field(default_factory=dict)

    def size(self, path: tuple[str, ...], above: tuple[tuple[str, ...], ...]) -> tuple[int, int]:
        """Return the number of interpolations to resolve in the value at ``path``, and of its characters."""
        if path in self.known:
            return self.known[path]
        where = f"{self.name}: {shown_key('.'.join(path))}"
        if path in above:
            reject(where, "refers to itself", "Write the value itself")
        if len(above) > MOST_DEPTH:
            reject(where, f"is interpolated over more than {MOST_DEPTH} other values")
        above = (*above, path)
        value, _ = self._follow(path)
        if isinstance(value, str):
            found = INNERMOST.findall(value)
            sizes = [(len(found), len(value)), *(self._reference(each, path, above) for each in found)]
        else:
            sizes = [(0, 1), *(self.size((*path, str(key)), above) for key, _ in items(value))]
        total = (sum(each[0] for each in sizes), sum(each[1] for each in sizes))
        self.known[path] = total
        return total

    def _reference(self, found: str, path: tuple[str, ...], above: tuple[tuple[str, ...], ...]) -> tuple[int, int]:
        if ":" in found:  # a resolver: its argument is a short text
            return 0, MOST_KEY
        dots = len(found) - len(found.lstrip("."))
        start = path[:-dots] if dots else ()
        _, target = self._follow((*start, *filter(None, re.split(r"[.\[\]]+", found.strip()))))
        return (0, 0) if not target else self.size(target, above)

    def _follow(self, path: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
        """Return the value at ``path``, or the interpolation on the way to it, with its own path."""
        node = self.raw
        for index, part in enumerate(path):
            children = {str(key): value for key, value in items(node)}
            if part not in children:
                return (node, path[:index]) if isinstance(node, str) else (None, ())
            node = children[part]
        return node, path


def shown_key(key: str) -> str:
    """Return a key for a message, in 80 characters at most."""
    return key if len(key) <= 80 else f"{key[:77]}..."


def leaves(raw: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of everything in mappings and lists that is neither."""
    for key, value in items(raw):
        if isinstance(value, Mapping | list | tuple):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def items(raw: Any) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a mapping or a list, with their keys; nothing for any other value."""
    if isinstance(raw, Mapping):
        return raw.items()
    return enumerate(raw) if isinstance(raw, list | tuple) else ()
