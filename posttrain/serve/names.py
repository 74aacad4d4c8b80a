"""The names of models: digests, and aliases that are resolved when a request is admitted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.errors import reject, suggest
from posttrain.serve.catalogue import Catalogue

BASE, LATEST, PREVIOUS = "base", "latest", "previous"
NUMBERED = re.compile(r"v[1-9]\d*")
SHORTEST = 8
"""Characters of a digest that name a model."""


@dataclass(frozen=True)
class Names:
    """Names at one moment; a promotion makes new ones."""

    aliases: Mapping[str, str]
    """Digest of each alias."""
    digests: frozenset[str] = field(default=frozenset())
    """Digests of the loaded models."""

    def find(self, name: str) -> str | None:
        """Return the digest behind a name: an alias, a digest or its beginning; None for an unknown one."""
        if name in self.aliases:
            return self.aliases[name]
        found = [digest for digest in self.digests if len(name) >= SHORTEST and digest.startswith(name)]
        return found[0] if len(found) == 1 else None

    def require(self, asked: Sequence[str]) -> None:
        """Raise BadInput for a name that is unknown."""
        for name in asked:
            if self.find(name) is None:
                reject(f"model {name}", "is unknown", suggest(name, self.aliases))

    def of(self, digest: str) -> list[str]:
        """Return the aliases of a digest."""
        return [alias for alias, known in self.aliases.items() if known == digest]


def names_of(catalogue: Catalogue, moved: Mapping[str, tuple[str, ...]], loaded: frozenset[str]) -> Names:
    """Return the names of a catalogue, and of the aliases that were ``moved`` to loaded models.

    ``moved`` has the digests of each alias, the newest last. ``latest`` is the last artifact by lineage until it is
    moved, and ``previous`` the one before it.
    """
    line = [served.digest for served in catalogue.artifacts]
    aliases = {BASE: catalogue.bases[0].digest} | {f"v{n}": digest for n, digest in enumerate(line, start=1)}
    known = {alias: [digest for digest in digests if digest in loaded] for alias, digests in moved.items()}
    latest = [*line, *known.get(LATEST, [])]
    aliases[LATEST] = latest[-1]
    before = [digest for digest in latest[:-1] if digest != latest[-1]]
    if before:
        aliases[PREVIOUS] = before[-1]
    aliases |= {alias: digests[-1] for alias, digests in known.items() if digests}
    return Names(aliases, loaded)
