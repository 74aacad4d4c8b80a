"""The plugins that the user wants, by two environment variables; see ``host.plugins``."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """The plugins that the user wants."""

    wanted: dict[str, str | None]
    """Names with the versions they are pinned to; empty for all plugins."""
    blocked: frozenset[str]

    @classmethod
    def from_environment(cls) -> Choice:
        """Read the two environment variables."""
        words = _words("POSTTRAIN_PLUGINS")
        pins = {name.strip(): version.strip() or None for name, _, version in (word.partition("==") for word in words)}
        return cls(pins, frozenset(_words("POSTTRAIN_BLOCK_PLUGINS")))

    def leaves_out(self, name: str) -> str | None:
        """Return the reason for which the user keeps a plugin from loading, or None."""
        if name in self.blocked:
            return "POSTTRAIN_BLOCK_PLUGINS names it"
        return "POSTTRAIN_PLUGINS does not name it" if self.wanted and name not in self.wanted else None


def _words(variable: str) -> list[str]:
    return [word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()]
