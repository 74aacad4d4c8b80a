"""The arguments of a command that composes no recipe: words, ``key=value`` and ``--format``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.errors import reject, suggest

FORMAT = "--format"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of one command."""

    plain: list[str]
    """Words that are neither ``key=value`` nor flags."""
    settings: dict[str, str]
    """Values by key."""
    format: str
    """One of the command's formats, by default the first; empty for a command without formats."""
    flags: frozenset[str] = frozenset()
    """Flags that were given, such as ``--html``."""


def parse(
    command: str, words: Sequence[str], keys: Sequence[str], formats: Sequence[str] = (), flags: Sequence[str] = ()
) -> Arguments:
    """Parse the words of a command with these keys, formats and flags. Raises BadInput naming the first wrong word."""
    plain, settings, chosen, seen = [], {}, formats[0] if formats else "", set()
    waiting = iter(words)
    for word in waiting:
        key, given, value = word.partition("=")
        if key == FORMAT and formats:
            chosen = value if given else next(waiting, "")
            _require(f"{command} {FORMAT} {chosen}", "format", chosen, formats)
        elif word.startswith("-"):
            _require(f"{command} {word}", "flag", word, [*([FORMAT] if formats else []), *flags])
            seen.add(word)
        elif given:
            _require(f"{command} {word}", "setting", key, keys)
            settings[key] = value
        else:
            plain.append(word)
    return Arguments(plain=plain, settings=settings, format=chosen, flags=frozenset(seen))


def _require(where: str, kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        reject(where, f"{name!r} is no {kind} of this command", suggest(name, known) if known else f"It has no {kind}s")
