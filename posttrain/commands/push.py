"""``posttrain push``: a promoted artifact in a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from posttrain.artifact import require_artifact, verify
from posttrain.commands.arguments import parse
from posttrain.commands.card import card_of
from posttrain.errors import reject

USAGE = "posttrain push ARTIFACT OWNER/NAME [public=true] [base_model=OWNER/NAME] [license=ID] [output_root=DIR]"
KEYS = ("public", "base_model", "license", "output_root")


def main(words: list[str]) -> int:
    """Verify a promoted artifact, and upload it with its card as a revision named by its digest."""
    given = parse("push", words, KEYS)
    if len(given.plain) != 2:
        reject(" ".join(["push", *words]), "needs an artifact and a repository", USAGE)
    public = given.settings.get("public", "false")
    if public not in ("true", "false"):
        reject(f"public={public}", "is neither true nor false", USAGE)
    artifact, repo = verify(require_artifact(Path(given.plain[0]))), given.plain[1]
    from posttrain.export.hub import push
    from posttrain.report.card import root_of
    from posttrain.run.start import find_standing

    root = Path(given.settings["output_root"]) if "output_root" in given.settings else root_of(artifact)
    if doubt := find_standing(artifact, root).doubt:
        fix = "Push what a gate has promoted; posttrain gate adapter=DIR gate=NAME judges an artifact without a verdict"
        reject(str(artifact.path), f"{artifact.named} {doubt}", fix)
    pushed = push(artifact, card_of(artifact, given.settings), repo, public=public == "true")
    for name in pushed.removed:
        print(f"removed    {name}: a file of the artifact that was there before")
    state = "there already" if pushed.commit is None else f"commit {pushed.commit[:12]}"
    print(f"pushed     {artifact.named} to {pushed.url} ({state})")
    base = artifact.manifest.base.name
    if artifact.is_adapter and Path(base).expanduser().is_dir():
        print(f"note       its base is a folder of this machine, {base}: whoever uses it gives model.path=BASE")
    return 0
