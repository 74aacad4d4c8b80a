"""A verdict on disk: verdict.json holds the decision and everything it was made from, but for the scores.

    {"state": "pass", "tasks": [...], "scored_by": [...], "judged_by": [...],
     "basis": {"asked": [{"gate": ..., "tasks": ..., "systems": ...}],
               "scorecard": "<SHA-256 of scorecard.jsonl>", ...},
     "gate_digest": "...", "digest": "<SHA-256 of all of the above>"}

The file is never taken at its word: the scorecard that it names is judged again, and has to give the same decision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.artifact import ModelSource
from posttrain.config.schema import GateConfig, GateTask
from posttrain.digests import digest_of
from posttrain.disk import replace_text
from posttrain.errors import ArtifactDamaged, PluginFailed
from posttrain.gate.sequential import Look
from posttrain.gate.spec import GateRequest, Scorecard, Verdict
from posttrain.gate.verdict import join, judge, verdict_json
from posttrain.host.plugins import CORE_ORIGIN, installed_labels
from posttrain.saved import convert, plain, read_json, read_text, require_file
from posttrain.scoring.scorecard import parse_scorecard, scorecard_text

FORMAT = 2
VERDICT = "verdict.json"
SCORECARD = "scorecard.jsonl"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The part of a gate's request that decides, as it is kept."""

    stage: str
    gate: GateConfig
    tasks: Mapping[str, GateTask]
    systems: Mapping[str, str]
    """Digest of each system."""
    unpromoted: tuple[str, ...]
    """Artifacts below the candidate that no gate passed."""

    @classmethod
    def of(cls, request: GateRequest) -> Asked:
        """Return the part of a request that decides."""
        systems = {role: source.digest for role, source in request.systems.items()}
        return cls(
            stage=request.stage, gate=request.gate, tasks=request.tasks, systems=systems, unpromoted=request.unpromoted
        )

    def request(self, scorecard: Path) -> GateRequest:
        """Return the request again; its systems have their digests alone."""
        nowhere = Path()
        systems = {
            role: ModelSource(
                name=role, model=nowhere, adapter=None, tokenizer=nowhere, chat_template="", digest=digest, base="",
                model_digest="",
            )
            for role, digest in self.systems.items()
        }  # fmt: skip
        return GateRequest(
            stage=self.stage, gate=self.gate, tasks=self.tasks, systems=systems, dtype="", cache=nowhere,
            scorecard=scorecard, unpromoted=self.unpromoted,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Everything a verdict was made from; the scores by their hash."""

    asked: tuple[Asked, ...]
    """One request, or two: against the base, and against a baseline."""
    scorecard: str
    """SHA-256 of scorecard.jsonl."""
    higher_is_better: Mapping[str, bool]
    settings: Mapping[str, str]
    documents: Mapping[str, int]
    clusters: Mapping[str, Mapping[int, str]]
    look: Look
    slices: Mapping[str, Mapping[str, Mapping[str, tuple[int, ...]]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class KeptVerdict:
    """Content of a verdict.json, whole and unchanged."""

    path: Path
    verdict: Verdict
    basis: Basis
    gate_digest: str
    """SHA-256 of everything the verdict depends on; empty for ``posttrain gate``."""

    @property
    def artifact(self) -> str:
        """Digest of the judged artifact."""
        return self.basis.asked[0].systems["candidate"]

    @property
    def is_cores(self) -> bool:
        """True when the statistics of this version alone decided, so that they can do it again."""
        return self.verdict.judged_by == (CORE_ORIGIN,)

    def scorecard(self) -> Scorecard:
        """Read the scores behind the verdict; raise ArtifactDamaged when they are other ones than it names."""
        path = self.path.with_name(SCORECARD)
        try:
            text = read_text(path)
        except FileNotFoundError:
            raise ArtifactDamaged(f"{path} is missing, and {self.path} rests on it. {_mend(self.path)}") from None
        rows = parse_scorecard(text, path)
        if _sha256(text) != self.basis.scorecard:
            what = f"holds other scores ({len(rows):,} rows) than those that {self.path} rests on"
            raise ArtifactDamaged(f"{path} {what}. {_mend(self.path)}")
        basis = self.basis
        return Scorecard(
            rows=tuple(rows), higher_is_better=basis.higher_is_better, settings=basis.settings,
            documents=basis.documents, clusters=basis.clusters, look=basis.look,
            slices=basis.slices,
        )  # fmt: skip

    def confirm(self) -> None:
        """Judge the scores again, as ``confirmed_verdict`` does."""
        scorecard = self.scorecard()
        if self.is_cores:
            requests = [asked.request(self.path.with_name(SCORECARD)) for asked in self.basis.asked]
            derived = join([judge(request, scorecard) for request in requests])
            if verdict_json(derived, decision_only=True) != verdict_json(self.verdict, decision_only=True):
                raise self.differs(derived)

    def missing_plugins(self) -> list[str]:
        """Return the plugins behind the verdict whose entry point is not installed, or in another version."""
        installed = {CORE_ORIGIN, *installed_labels()}
        behind = dict.fromkeys((*self.verdict.scored_by, *self.verdict.judged_by))
        return [label for label in behind if label.endswith(")") and label not in installed]

    def differs(self, derived: Verdict) -> ArtifactDamaged:
        """Return the error for a verdict that its scores do not give."""
        said, found = self.verdict.state, derived.state
        what = f"says {said}, but its scores say {found}" if said != found else "is not what its scores give"
        return ArtifactDamaged(f"{self.path} {what}: it was changed after it was written. {_mend(self.path)}")


def write_verdict(
    path: Path, verdict: Verdict, requests: Sequence[GateRequest], scorecard: Scorecard, gate_digest: str = ""
) -> None:
    """Write scorecard.jsonl, then verdict.json in ``path``, each in one step.

    Raises PluginFailed when the verdict of a plugin holds a value that cannot be kept.
    """
    try:
        text = scorecard_text(scorecard.rows)
        basis = Basis(
            asked=tuple(map(Asked.of, requests)), scorecard=_sha256(text), look=scorecard.look,
            higher_is_better=scorecard.higher_is_better, settings=scorecard.settings, documents=scorecard.documents,
            clusters=scorecard.clusters, slices=scorecard.slices,
        )  # fmt: skip
        values = {"format": FORMAT, **verdict_json(verdict), "basis": plain(basis), "gate_digest": gate_digest}
        record = json.loads(json.dumps(values, allow_nan=False))  # the order of tasks stays
        _parse(path, record)
    except (ValueError, TypeError) as error:
        raise PluginFailed(f"the verdict about {requests[0].stage} cannot be recorded: {error}") from None
    for name in (path, path.with_name(SCORECARD)):
        require_file(name)
    replace_text(path.with_name(SCORECARD), text)
    replace_text(path, json.dumps({**record, "digest": digest_of(record)}, indent=2) + "\n")


def read_verdict(path: Path) -> KeptVerdict:
    """Read a verdict.json; raise ArtifactDamaged unless it is whole and unchanged. Its scores are not looked at."""
    try:
        record = read_json(path)
        if not isinstance(record, dict) or "digest" not in record:
            raise ValueError("it holds no verdict of this version")
        claimed = record.pop("digest")
        if claimed != digest_of(record):
            raise ValueError("it was changed after it was written")
        return _parse(path, record)
    except ValueError as error:
        raise ArtifactDamaged(f"{path} is damaged: {error}. {_mend(path)}") from None


def confirmed_verdict(path: Path) -> KeptVerdict:
    """Read a verdict.json, judge the scores that it names again, and return it when the decision is the same.

    The decision of a plugin is not made again here, but its scores have to be the ones it names. Raises ArtifactDamaged
    otherwise, FileNotFoundError without a file.
    """
    kept = read_verdict(path)
    kept.confirm()
    return kept


def _parse(path: Path, record: Mapping[str, Any]) -> KeptVerdict:
    """Return a record of verdict.json without its digest; raise ValueError when it is none."""
    values = dict(record)
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"its format is {record.get('format')!r}, this version reads {FORMAT}")
    basis: Basis = convert(Basis, values.pop("basis", None), "basis")
    gate_digest: str = convert(str, values.pop("gate_digest", None), "gate_digest")
    if not basis.asked or not all("candidate" in asked.systems for asked in basis.asked):
        raise ValueError("basis names no candidate")
    return KeptVerdict(path=path, verdict=convert(Verdict, values), basis=basis, gate_digest=gate_digest)


def _mend(path: Path) -> str:
    return f"Remove {path}, and the same command judges again"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
