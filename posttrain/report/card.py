"""The model card: README.md of an artifact with the hub's metadata, from its manifest, verdicts and ledger alone.

The exact figures of every comparison are in the metadata (``model-index``), the rounded ones in the tables.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.artifact import CARD, DOUBT, MANIFEST, Artifact, Manifest, read_manifest
from posttrain.config.schema import OnFail
from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import TaskVerdict, Verdict
from posttrain.ledger import GATES, Row, lifts
from posttrain.model.llama import digest_of_record
from posttrain.quoting import cell, markdown, redacted
from posttrain.report.scores import scale_of
from posttrain.run.directory import read_state
from posttrain.run.start import Standing, find_export_standing, find_standing
from posttrain.run.verdict import VERDICT, KeptVerdict, confirmed_verdict, read_verdict
from posttrain.saved import read_json, read_text

EXPORTS = "exports"
"""Folder beside an artifact for its exports; each has a record of its parity, FILE.json."""
FIGURES = (
    "role", "against", "n", "base", "parent", "candidate", "lift", "low", "high", "confidence", "threshold", "state",
    "method", "adjusted_low", "bootstrap_low", "bootstrap_high", "filter", "higher_is_better",
)  # fmt: skip
"""Fields of a comparison that the metadata hold as they are."""
ASKED = (
    "The same documents were asked of every system; lifts are paired differences with their confidence bounds. "
    "Shares are in points of 100."
)
COLUMNS = ("task", "role", "n", "base", "parent", "candidate", "lift", "against", "verdict")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Facts about the base that no file of a run holds."""

    base_model: str | None
    """Name of the base on the hub; None for a base that has none."""
    licence: str | None
    """Licence of the base, by the hub's name."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is recorded about an artifact."""

    artifact: Artifact
    lineage: tuple[tuple[Manifest, str], ...]
    """Manifest and digest of the artifact and of those below it, the newest first, as far as their folders exist."""
    verdicts: tuple[KeptVerdict, ...]
    """Verdicts about it, confirmed: its stage's, then those of ``posttrain gate``."""
    standing: Standing
    rows: tuple[Row, ...]
    """Its rows of the ledger."""
    command: tuple[str, ...]
    """Words of the command of its run; empty when it is in none."""
    exports: tuple[Mapping[str, Any], ...]
    """Records of its exports."""


def read_evidence(artifact: Artifact, root: Path) -> Evidence:
    """Read what the run of an artifact, the gates and the ledger below ``root`` hold about it.

    Raises ArtifactDamaged when its stage's verdict is not what its scores give, or the ledger was changed.
    """
    return Evidence(
        artifact=artifact,
        lineage=tuple(_lineage(artifact)),
        verdicts=tuple(_verdicts(artifact, root)),
        standing=find_standing(artifact, root),
        rows=tuple(row for row in lifts(root) if row.lift.artifact == artifact.digest),
        command=_command(artifact),
        exports=tuple(_exports(artifact, root)),
    )


def root_of(artifact: Artifact) -> Path:
    """Return the output root of an artifact in a run's stage, and ``runs`` for any other folder."""
    stage = artifact.path.resolve().parent
    return stage.parents[2] if os.path.lexists(stage.parents[1] / "run.json") else Path("runs")


def origin_of(artifact: Artifact, base_model: str | None = None, licence: str | None = None) -> Origin:
    """Return the base's hub name and licence: as given, else by the manifest, and by the base's own card if it is here.

    A base in a folder of this machine has no name that others could load.
    """
    name = artifact.manifest.base.name
    folder = Path(name).expanduser()
    is_local = folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
    card = folder / CARD if is_local else _cached_card(name)
    found = _metadata_of(card) if licence is None and card is not None else {}
    stated = licence or found.get("license")
    named = base_model or (None if is_local else name)
    return Origin(base_model=named, licence=stated if isinstance(stated, str) else None)


def card(evidence: Evidence, origin: Origin) -> str:
    """Return the card: the hub's metadata as YAML, then the same for people."""
    sections = (
        _head(evidence, origin), _gate_section(evidence), _overrides(evidence), _unmeasured(evidence, origin),
        _export_section(evidence), _lineage_section(evidence), _making(evidence),
    )  # fmt: skip
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    text = f"---\n{_metadata(evidence, origin)}\n---\n\n{body}\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no place in a file


def _verdicts(artifact: Artifact, root: Path) -> Iterator[KeptVerdict]:
    folder = artifact.path.resolve().parent
    for path in (folder / VERDICT, *sorted(folder.glob(f"evidence.*/{VERDICT}"))):
        if os.path.lexists(path) and read_verdict(path).artifact == artifact.digest:
            yield confirmed_verdict(path)
    for path in sorted((root / GATES).glob(f"*/{VERDICT}")):
        try:
            if read_verdict(path).artifact == artifact.digest:
                yield confirmed_verdict(path)
        except ArtifactDamaged:  # about whichever adapter
            continue


def _lineage(artifact: Artifact) -> Iterator[tuple[Manifest, str]]:
    """Yield the manifest of the artifact and of every one below it in the same run."""
    known = {}
    for path in artifact.path.resolve().parents[1].glob("*/artifact*"):
        try:
            values = read_manifest(path)
            known[values["digest"]] = Manifest.from_json(values, path / MANIFEST)
        except (OSError, ArtifactDamaged):
            continue
    digest, manifest = artifact.digest, artifact.manifest
    while True:
        yield manifest, digest
        digest = manifest.parent_digest
        if digest not in known:
            return
        manifest = known.pop(digest)


def _command(artifact: Artifact) -> tuple[str, ...]:
    try:
        return tuple(read_state(artifact.path.resolve().parents[2]).command)
    except (OSError, ArtifactDamaged):
        return ()


def _exports(artifact: Artifact, root: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted((artifact.path.resolve().parent / EXPORTS).glob("*.json")):
        try:
            record = read_json(path)
        except (OSError, ArtifactDamaged):
            continue
        if isinstance(record, dict) and record.get("artifact") == artifact.digest:
            state = find_export_standing(digest_of_record(record), artifact, root).state
            yield {**record, "gate": {"pass": "passed", "fail": "failed"}.get(state, state)}


def _cached_card(name: str) -> Path | None:
    """Return the card of a base in the hub's cache, None when there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, CARD)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _metadata_of(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        parts = read_text(path).split("---\n", 2)
        values = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (OSError, ArtifactDamaged, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _metadata(evidence: Evidence, origin: Origin) -> str:
    """Return the hub's metadata as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    made = evidence.artifact.manifest
    is_adapter = evidence.artifact.is_adapter
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=redacted(task.task), dataset_name=redacted(task.task),
            dataset_revision=task.questions, metric_type=redacted(task.metric), metric_value=task.candidate,
            metric_name=f"{redacted(task.metric)} ({task.role}, against {task.against})",
            metric_args={name: value for name in FIGURES if (value := getattr(task, name)) is not None},
        )
        for kept in evidence.verdicts
        for task in kept.verdict.tasks
    ]  # fmt: skip
    values: dict[str, Any] = {"base_model_relation": "adapter" if is_adapter else "finetune"}
    found = ModelCardData(
        base_model=origin.base_model, license=origin.licence, library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation", tags=["posttrain", *made.lineage], model_name=_name(evidence),
        eval_results=results or None, **(values if origin.base_model else {}),
    )  # fmt: skip
    if not results:
        del found.model_name
    return found.to_yaml().strip()


def _name(evidence: Evidence) -> str:
    made = evidence.artifact.manifest
    return f"{redacted(made.recipe)} {redacted(made.stage)} {evidence.artifact.digest[:12]}"


def _head(evidence: Evidence, origin: Origin) -> list[str]:
    made, standing = evidence.artifact.manifest, evidence.standing
    kind = "a peft adapter" if evidence.artifact.is_adapter else "full weights"
    named = origin.base_model or Path(made.base.name).name
    verdict = "promoted by its gate" if standing.doubt is None else f"not promoted: it {_plain(standing)}"
    return [
        f"# {markdown(_name(evidence))}",
        "",
        f"This is {kind} on {markdown(named)}, made by {markdown(' → '.join(made.lineage))}, {verdict}.",
        "",
        f"- digest `{evidence.artifact.digest}`; `manifest.json` holds the SHA-256 of every file",
        f"- base {markdown(named)}, weights `{made.base.digest}`",
        f"- licence of the base: {markdown(origin.licence or 'not recorded')}",
    ]


def _plain(standing: Standing) -> str:
    """Return the doubt about an artifact without the paths of this machine."""
    below = f"stands on what no gate passed: {'; '.join(standing.below)}" if standing.below else ""
    judged = {"fail": "was failed by a gate", "undecided": "was left undecided by its gate", "pass": below}
    return markdown(judged.get(standing.state, "was never judged"))


def _gate_section(evidence: Evidence) -> list[str]:
    if not evidence.verdicts:
        return []
    lines = ["## Gate", "", ASKED]
    for kept in evidence.verdicts:
        scored, judged = (markdown(", ".join(who) or "nobody known") for who in _behind(kept))
        gate, asked = kept.basis.asked[0].gate, markdown(kept.basis.asked[0].stage)
        decided = f"one-sided confidence {gate.confidence:g}; {markdown(kept.verdict.reason)}"
        lines += ["", f"**{asked}: {kept.verdict.state}**, {decided}. Scored by {scored}, judged by {judged}.", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(map(cell, _row(task, kept.verdict)))} |" for task in kept.verdict.tasks]
    if evidence.rows:
        last = evidence.rows[-1]
        lines += ["", f"{len(evidence.rows)} rows of the ledger, the last of them {last.seq}: `{last.hash}`."]
    return lines


def _behind(kept: KeptVerdict) -> tuple[Sequence[str], Sequence[str]]:
    return kept.verdict.scored_by, kept.verdict.judged_by


def _row(task: TaskVerdict, verdict: Verdict) -> tuple[str, ...]:
    scale = scale_of(task)
    scores = (scale.score(value) for value in (task.base, task.parent, task.candidate))
    lift = "; ".join(filter(None, [scale.interval(task.lift, task.low, task.high), verdict.recall(task.task)]))
    return (f"{task.task}: {task.metric}", task.role, f"{task.n:,}", *scores, lift, task.against, task.state)


def _overrides(evidence: Evidence) -> list[str]:
    """List what was switched off or let through."""
    found = []
    for kept in evidence.verdicts:
        gate, name = kept.basis.asked[0].gate, kept.basis.asked[0].stage
        switched = {
            "its gate was switched off": not kept.verdict.gated,
            "the run continues after a fail (on_fail: warn)": gate.on_fail is OnFail.warn,
            "the run continues without a decision (on_undecided: warn)": gate.on_undecided is OnFail.warn,
        }
        found += [f"{name}: {what}" for what, given in switched.items() if given]
        found += [f"{name}: stands on {below}, which no gate passed" for below in kept.verdict.unpromoted]
    merged = evidence.artifact.manifest.merge or {}
    found += [f"merged from an adapter that was not promoted: {merged[DOUBT]}"] if DOUBT in merged else []
    return ["## Overridden", "", *(f"- {markdown(text)}" for text in dict.fromkeys(found) or ["nothing"])]


def _unmeasured(evidence: Evidence, origin: Origin) -> list[str]:
    found = [] if evidence.verdicts else ["anything: no gate has judged this artifact"]
    for kept in evidence.verdicts:
        compared = {task.task: task.n for task in kept.verdict.tasks}
        asked = {name for each in kept.basis.asked for name in each.tasks}
        found += [f"{name}: no score was compared" for name in sorted(asked - compared.keys())]
        found += [
            f"{name}: {compared[name]:,} of {total:,} documents compared"
            for name, total in kept.basis.documents.items()
            if total > compared.get(name, total)
        ]
        undecided = [task for task in kept.verdict.tasks if task.state == "undecided"]
        found += [f"{task.task} against {task.against}: undecided" for task in undecided]
        found += kept.verdict.notes
    made = evidence.artifact.manifest
    found += ["the loss on records set aside from training"] if made.metrics.get("eval_loss") is None else []
    found += [] if evidence.exports else ["exports: none was compared with this artifact"]
    found += [] if origin.licence else ["the licence of the base: none is recorded"]
    found += ["everything else: a gate speaks of its own tasks only"] if evidence.verdicts else []
    return ["## Not measured", "", *(f"- {markdown(text)}" for text in dict.fromkeys(found))]


def _export_section(evidence: Evidence) -> list[str]:
    if not evidence.exports:
        return []
    heads = ("file", "type", "parity", "gate", "first token differs by", "greedy answers equal", "SHA-256")
    lines = ["## Exports", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for record in evidence.exports:
        shown = [str(record.get(key, "")) for key in ("file", "type", "parity", "gate", "log_prob", "greedy", "sha256")]
        lines.append(f"| {' | '.join(map(cell, shown))} |")
    return lines


def _lineage_section(evidence: Evidence) -> list[str]:
    lines = [
        "## Lineage",
        "",
        "| stage | kind | recipe | artifact | parent | data | seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for made, digest in evidence.lineage:
        data = made.data_digest[:12]
        cells = (made.stage, made.kind, made.recipe, digest[:12], made.parent_digest[:12], data, str(made.seed))
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    missing = len(evidence.artifact.manifest.lineage) - len(evidence.lineage)
    return [*lines, "", f"{missing} earlier stages are not in this run."] if missing > 0 else lines


def _making(evidence: Evidence) -> list[str]:
    made, command = evidence.artifact.manifest, evidence.command
    template = made.to_json()["template_sha256"]
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    listed = f"    {redacted(shlex.join(command))}" if command else "The command is not recorded beside this artifact."
    return [
        "## Made by", "", *listed.splitlines(), "",
        f"- plugin {markdown(made.plugin)}; number format {made.dtype}"
        + (f", base quantised to {made.quantization}" if made.quantization else ""),
        f"- chat template, SHA-256 `{template}`: `chat_template.jinja`",
        f"- added tokens: {markdown(', '.join(made.added_tokens) or 'none')}",
        *([f"- trained tokens: {made.metrics['tokens']:,}"] if isinstance(made.metrics.get("tokens"), int) else []),
        f"- versions: {markdown(versions or 'not recorded')}",
    ]  # fmt: skip
