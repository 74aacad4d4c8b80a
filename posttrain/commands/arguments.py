"""The arguments of a command that composes no recipe: words, ``key=value`` and ``--format``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    options: dict[str, str] = field(default_factory=dict)
    """Values of ``--option VALUE``, by option."""
    flags: frozenset[str] = frozenset()
    """Flags that are given."""


def parse(
    command: str,
    words: Sequence[str],
    keys: Sequence[str],
    formats: Sequence[str] = (),
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Arguments:
    """Parse the words of a command with these keys, formats, options and flags.

    Raises BadInput naming the first wrong word.
    """
    plain, settings, chosen = [], {}, formats[0] if formats else ""
    found: dict[str, str] = {}
    raised: set[str] = set()
    waiting = iter(words)
    for word in waiting:
        key, given, value = word.partition("=")
        if key == FORMAT and formats:
            chosen = value if given else next(waiting, "")
            _require(f"{command} {FORMAT} {chosen}", "format", chosen, formats)
        elif key in options:
            found[key] = value if given else next(waiting, "")
            if not found[key]:
                reject(f"{command} {key}", "needs a value")
        elif word in flags:
            raised.add(word)
        elif word.startswith("-"):
            _require(f"{command} {word}", "flag", key, [*([FORMAT] if formats else []), *options, *flags])
        elif given:
            _require(f"{command} {word}", "setting", key, keys)
            if not value.strip():
                reject(f"{command} {word}", "is empty", f"Give {key}=VALUE, or leave it out")
            settings[key] = value
        else:
            plain.append(word)
    return Arguments(plain=plain, settings=settings, format=chosen, options=found, flags=frozenset(raised))


def _require(where: str, kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        reject(where, f"{name!r} is no {kind} of this command", suggest(name, known) if known else f"It has no {kind}s")
