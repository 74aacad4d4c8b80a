"""The artifact under the first stage, ``start_from``: verified, stacked on SFT, and passed by the gate that judged it.

Its verdicts are those in its run, beside it, and those of ``posttrain gate`` below the same output root. A copy of its
folder has none: what cannot be shown was never judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.artifact import DOUBT, MANIFEST, Artifact, Manifest, read_manifest, require_artifact, verify
from posttrain.errors import ArtifactDamaged, BadInput, Problem
from posttrain.ledger import GATES
from posttrain.plan import CORE, Plan
from posttrain.run.verdict import VERDICT, KeptVerdict, read_verdict

NEVER = "never judged"
STANDING = {"fail": "failed by its gate", "undecided": "left undecided by its gate", NEVER: NEVER}
SETTING = "start_from_unpromoted"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The answer of the gates about an artifact."""

    state: str
    """pass, fail, undecided, or NEVER."""
    reason: str
    """The deciding figures with the verdict's file; the reason for which there is none."""
    below: tuple[str, ...] = ()
    """Artifacts below it that no gate passed."""

    @property
    def doubt(self) -> str | None:
        """Reason against building on the artifact; None when it is promoted."""
        if self.state == "pass":
            return f"stands on what no gate passed: {'; '.join(self.below)}" if self.below else None
        return f"{'was' if self.state == NEVER else 'is'} {STANDING[self.state]}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Start:
    """The artifact under the first stage."""

    artifact: Artifact
    unpromoted: tuple[str, ...]
    """Artifacts that no gate passed, this one or below it, each with its verdict."""


def read_start(plan: Plan) -> Start | None:
    """Return the artifact under the first stage; None when that is the base itself.

    Raises ArtifactDamaged when it does not match its manifest, BadInput when it is not stacked on SFT, or not promoted
    and the recipe does not say ``start_from_unpromoted: true``.
    """
    if plan.start_from is None:
        return None
    artifact = verify(plan.start_from)
    if problems := _problems(plan, artifact):
        raise BadInput(problems)
    standing = find_standing(artifact, plan.output_root)
    own = () if standing.state == "pass" else (f"{artifact.named}: {standing.state}",)
    return Start(artifact=artifact, unpromoted=(*standing.below, *own))


def read_base(plan: Plan) -> tuple[str, ...]:
    """Return what no gate passed in a base that was merged from an adapter; nothing for any other base."""
    folder = Path(plan.model.path).expanduser()
    if not (folder / MANIFEST).is_file():
        return ()
    try:
        merged = read_manifest(folder).get("merge")
    except ArtifactDamaged:  # the weights are hashed and checked as those of any base are
        return ()
    doubt = merged.get(DOUBT) if isinstance(merged, dict) else None
    return (f"model.path, merged from an adapter: {doubt}",) if doubt else ()


def check_start(plan: Plan) -> Sequence[Problem]:
    """Return why ``start_from`` cannot be the start, as far as its manifest and verdicts tell without its weights."""
    if plan.start_from is None:
        return []
    try:
        require_artifact(plan.start_from)
    except BadInput as error:
        return error.problems
    try:
        values = read_manifest(plan.start_from)
        manifest = Manifest.from_json(values, plan.start_from / MANIFEST)
    except ArtifactDamaged:  # the run names it, and ends with another exit code
        return []
    return _problems(plan, Artifact(plan.start_from, manifest, values["digest"]))


def _problems(plan: Plan, artifact: Artifact) -> Sequence[Problem]:
    where = f"start_from={plan.start_from}"
    if CORE not in artifact.manifest.lineage:
        what = f"the artifact is stacked on {list(artifact.manifest.lineage)}, not on SFT"
        return [Problem(where=where, what=what, fix="Give an artifact stacked on SFT")]
    standing = find_standing(artifact, plan.output_root)
    if plan.start_from_unpromoted or standing.doubt is None:
        return []
    what = f"the artifact {artifact.named} {standing.doubt}"
    fix = f"Give a promoted artifact, or set {SETTING}=true: the verdict of every stage then says what it stands on"
    return [Problem(where=where, what=what, fix=fix)]


def find_standing(artifact: Artifact, root: Path) -> Standing:
    """Return what the gates said of an artifact.

    Its run's own verdict decides, unless ``posttrain gate`` has failed it; without one, the worst that command said.
    """
    folder = artifact.path.resolve().parent
    own = next(_standings([folder, *sorted(folder.glob("evidence.*"))], artifact.digest), None)
    others = _by_gates(artifact.digest, root, folder)
    failed = [standing for standing in others if standing.state == "fail"]
    if own is not None and own.state != NEVER:
        return failed[0] if failed and own.state == "pass" else own
    missing = Standing(state=NEVER, reason=f"no verdict about it in {folder} or {root / GATES}")
    return next(iter(others), own or missing)


def find_export_standing(digest: str, artifact: Artifact, root: Path) -> Standing:
    """Return the worst that ``posttrain gate`` said of a file with this digest, written from an artifact."""
    missing = Standing(state=NEVER, reason=f"no verdict about it in {root / GATES}")
    return next(iter(_by_gates(digest, root, artifact.path.resolve().parent)), missing)


def _by_gates(digest: str, root: Path, folder: Path) -> list[Standing]:
    """Return what ``posttrain gate`` said, the worst first, below the root and below that of a stage's ``folder``."""
    roots = dict.fromkeys([root.resolve(), *folder.parents[2:3]])
    found = _standings([path for each in roots for path in sorted((each / GATES).glob("*"))], digest)
    return sorted(found, key=lambda standing: ("fail", "undecided", NEVER, "pass").index(standing.state))


def _standings(folders: Sequence[Path], digest: str) -> Iterator[Standing]:
    """Yield what the verdicts in these folders say, as far as they are about what has this digest."""
    for path in (folder / VERDICT for folder in folders):
        try:
            kept = read_verdict(path)
            if kept.artifact == digest:
                kept.confirm()
                yield _standing(kept)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except ArtifactDamaged as error:
            if path.parents[1].name == GATES:  # about whichever adapter
                continue
            yield Standing(state=NEVER, reason=f"its verdict cannot be believed: {error}")


def _standing(kept: KeptVerdict) -> Standing:
    verdict, path = kept.verdict, kept.path
    if not verdict.gated:
        return Standing(state=NEVER, reason=f"its gate was switched off ({path})", below=verdict.unpromoted)
    if missing := kept.missing_plugins():
        reason = f"{', '.join(missing)}, behind its verdict, is not installed ({path})"
        return Standing(state=NEVER, reason=reason, below=verdict.unpromoted)
    return Standing(state=verdict.state, reason=f"{verdict.reason} ({path})", below=verdict.unpromoted)
