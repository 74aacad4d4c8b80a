"""``posttrain rollback``: give a name back to the artifact that it stood for before its last promotion."""

from __future__ import annotations

from pathlib import Path

from posttrain.commands.arguments import parse
from posttrain.commands.promote import require_alias, show
from posttrain.errors import reject
from posttrain.ledger import move

USAGE = "posttrain rollback ALIAS [output_root=DIR]"


def main(words: list[str]) -> int:
    """Record the rollback, which running servers follow within a second."""
    given = parse("rollback", words, ("output_root",))
    if len(given.plain) != 1:
        reject(" ".join(["rollback", *words]), "needs a name", USAGE)
    show(move(Path(given.settings.get("output_root", "runs")), require_alias(given.plain[0]), None))
    return 0
