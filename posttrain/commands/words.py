"""What follows a command's name: words, ``key=value`` and ``--format``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.errors import BadInput, Problem, suggest

FORMAT = "--format"


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of one command, understood."""

    plain: list[str]
    settings: dict[str, str]
    format: str
    """One of the command's formats; the first when none is given, empty when it has none."""


def understood(command: str, words: Sequence[str], keys: Sequence[str], formats: Sequence[str]) -> Words:
    """The words of a command that knows these keys and formats; raises BadInput naming the first word that is wrong."""
    plain, settings, chosen = [], {}, formats[0] if formats else ""
    waiting = iter(words)
    for word in waiting:
        key, given, value = word.partition("=")
        if key == FORMAT and formats:
            chosen = value if given else next(waiting, "")
            _require(f"{command} {FORMAT} {chosen}", chosen, formats)
        elif word.startswith("-"):
            _require(f"{command} {word}", word, [FORMAT] if formats else [])
        elif given:
            _require(f"{command} {word}", key, keys)
            settings[key] = value
        else:
            plain.append(word)
    return Words(plain=plain, settings=settings, format=chosen)


def _require(where: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise BadInput(Problem(where=where, what=f"{name!r} is not known here", fix=suggest(name, known)))
