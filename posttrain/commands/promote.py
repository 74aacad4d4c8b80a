"""``posttrain promote``: give a name to an artifact, which running servers follow within a second."""

from __future__ import annotations

import os
import re
from pathlib import Path

from posttrain.artifact import MANIFEST, Artifact, read_manifest, verify
from posttrain.commands.arguments import parse
from posttrain.errors import ArtifactDamaged, reject
from posttrain.ledger import Release, Standing, move

USAGE = "posttrain promote ALIAS DIGEST [output_root=DIR]"
FLAG = "--allow-unpromoted"
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
FIXED = re.compile(r"base|previous|v\d+|[0-9a-f]{8,}")
"""Names that servers give themselves, and the beginnings of digests."""
SHORTEST = 8


def main(words: list[str]) -> int:
    """Record that a name stands for an artifact from now on."""
    given = parse("promote", words, ("output_root",), flags=(FLAG,))
    if len(given.plain) != 2:
        reject(" ".join(["promote", *words]), "needs a name and a digest", USAGE)
    root, alias = Path(given.settings.get("output_root", "runs")), require_alias(given.plain[0])
    artifact = verify(_find(root, given.plain[1]))
    from posttrain.run.start import find_standing

    doubt = find_standing(artifact, root).doubt
    if doubt is not None and FLAG not in given.flags:
        reject(f"promote {alias}", f"the artifact {artifact.named} {doubt}", f"Promote another one, or give {FLAG}")
    show(move(root, alias, _standing(root, artifact), doubt or ""))
    return 0


def require_alias(alias: str) -> str:
    """Return a name that can be promoted. Raises BadInput for any other."""
    if not ALIAS.fullmatch(alias) or FIXED.fullmatch(alias):
        what = "cannot be promoted: base, previous, v1, v2 and so on, and digests are a server's own names"
        reject(f"alias {alias}", what, "Take latest, or a name of letters, digits, '-', '_' and '.', such as live")
    return alias


def show(release: Release) -> None:
    """Print what a name stands for now."""
    now = release.artifact[:12] or "the last artifact by lineage"
    before = f", before that {release.replaced[:12]}" if release.replaced else ""
    print(f"{release.action:<10} {release.alias} is {now}{before}")


def _standing(root: Path, artifact: Artifact) -> Standing:
    return Standing(artifact=artifact.digest, path=os.path.relpath(artifact.path.resolve(), root.resolve()))


def _find(root: Path, word: str) -> Path:
    """Return the folder of the artifact with this digest, or its beginning, below the output root."""
    if os.path.lexists(Path(word) / MANIFEST):
        return Path(word)
    if len(word) < SHORTEST:
        reject(f"digest {word}", f"has fewer than {SHORTEST} characters", USAGE)
    found: dict[str, Path] = {}
    for path in sorted(root.glob(f"*/stages/*/artifact*/{MANIFEST}")):
        try:
            digest = str(read_manifest(path.parent)["digest"])
        except ArtifactDamaged:  # another one may be meant; this one is named by report and serve
            continue
        if digest.startswith(word):
            found.setdefault(digest, path.parent)
    if len(found) != 1:
        what = f"is the beginning of {len(found)} artifacts" if found else "is no artifact"
        reject(f"digest {word}", f"{what} below {root}", "posttrain leaderboard lists them; output_root=DIR for others")
    return next(iter(found.values()))
