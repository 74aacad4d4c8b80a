"""``posttrain card``: README.md of an artifact, with the hub's metadata."""

from __future__ import annotations

from pathlib import Path

from posttrain.artifact import CARD, Artifact, read_manifest, require_artifact, verify
from posttrain.commands.arguments import parse
from posttrain.disk import replace_text
from posttrain.errors import reject

USAGE = "posttrain card ARTIFACT [output=FILE] [base_model=OWNER/NAME] [license=ID] [output_root=DIR]"
KEYS = ("output", "base_model", "license", "output_root")


def main(words: list[str]) -> int:
    """Write the card of an artifact into its folder, or to ``output``."""
    given = parse("card", words, KEYS)
    if len(given.plain) != 1:
        reject(" ".join(["card", *words]), "needs one artifact", USAGE)
    artifact = verify(require_artifact(Path(given.plain[0])))
    output = Path(given.settings.get("output", artifact.path / CARD))
    if output == artifact.path / CARD and CARD in read_manifest(artifact.path)["files"]:
        reject(str(output), "is part of the artifact itself", "Write the card elsewhere: output=FILE")
    replace_text(output, card_of(artifact, given.settings))
    print(f"card       {output}")
    return 0


def card_of(artifact: Artifact, settings: dict[str, str]) -> str:
    """Return the card of an artifact, with the settings of the command."""
    from posttrain.report.card import card, origin_of, read_evidence, root_of

    root = Path(settings["output_root"]) if "output_root" in settings else root_of(artifact)
    return card(read_evidence(artifact, root), origin_of(artifact, settings.get("base_model"), settings.get("license")))
