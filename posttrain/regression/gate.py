"""One gate about one adapter or model that is there already: found, compared, judged; nothing is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import ledger
from posttrain.artifact import BaseWeights, ModelSource
from posttrain.config.regression import Gating
from posttrain.config.schema import GateTask, Role, Sequential
from posttrain.digests import digest_of
from posttrain.gate.procedure import decide_candidate, score_systems
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard, Verdict, worst
from posttrain.gate.verdict import write_verdict
from posttrain.host.plugins import Host
from posttrain.regression.baseline import (
    baseline_of,
    read_baseline,
    require_same_asked,
    with_baseline,
    write_baseline,
)
from posttrain.regression.candidate import Candidate, find_candidate, require_same_ground
from posttrain.run.display import Display, EvaluationProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a gate said about a candidate, and where it left its scores."""

    candidate: Candidate
    verdict: Verdict
    folder: Path
    """Holds scorecard.jsonl, questions.jsonl and verdict.json."""
    rows: tuple[DocumentScore, ...]
    """Every score of base, candidate and, as ``parent``, the baseline."""


def is_scores(baseline: str) -> bool:
    """Whether a baseline is a file of scores rather than the directory of an adapter."""
    return baseline.endswith(".json")


def gate(name: str, gating: Gating, tasks: Mapping[str, GateTask], host: Host, display: Display) -> Outcome:
    """Judge an adapter or model against its base and, where one is given, against a baseline.

    Raises GateRefused when it computes what its base computes, BadInput when it and the baseline cannot be compared,
    ArtifactDamaged when it is an artifact that its manifest does not match.
    """
    ledger.check(Path(gating.output_root))
    candidate = find_candidate(Path(gating.adapter), gating.model)
    previous = _previous(gating, candidate)
    from posttrain.regression.changes import require_change, require_same_tokenizer, require_tokenizer

    tokenizer = require_tokenizer(candidate)
    if previous is not None:
        require_same_tokenizer(tokenizer, previous)
    asked = _asked(gating, candidate, tokenizer)
    if (scores := _scores(gating)) is not None:
        require_same_asked(scores, read_baseline(scores), asked)
    if not candidate.verified:
        require_change(candidate)
    run = _Run(name, gating, tasks, host, display, candidate, asked)
    return run.against(previous, scores)


def _previous(gating: Gating, candidate: Candidate) -> Candidate | None:
    """The adapter that a baseline is, on the base of the candidate."""
    if gating.baseline is None or is_scores(gating.baseline):
        return None
    base = replace(gating.model, path=str(candidate.base.model), revision=None)
    previous = find_candidate(Path(gating.baseline), base)
    require_same_ground(candidate, previous)
    return previous


def _scores(gating: Gating) -> Path | None:
    """The file of scores that is compared with; one that is to be written is not."""
    if gating.baseline is None or not is_scores(gating.baseline) or gating.update_baseline:
        return None
    return Path(gating.baseline).expanduser()


def _asked(gating: Gating, candidate: Candidate, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything besides the tasks that has to be equal for scores to be comparable."""
    from posttrain.model.loading import default_device
    from posttrain.scoring.fingerprint import library_versions, tokenizer_digest

    return {
        "base": candidate.base.model_digest,
        "chat_template": hashlib.sha256(candidate.source.chat_template.encode()).hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "dtype": candidate.dtype,
        "quantization": candidate.source.quantization,
        "backend": gating.gate.backend.value,
        "batch_size": gating.gate.batch_size,
        "seed": gating.gate.seed,
        "device": default_device().type,
        "versions": library_versions(),
    }


@dataclass(frozen=True)
class _Run:
    """One gate while it is run."""

    name: str
    gating: Gating
    tasks: Mapping[str, GateTask]
    host: Host
    display: Display
    candidate: Candidate
    asked: Mapping[str, Any]

    def against(self, previous: Candidate | None, scores: Path | None) -> Outcome:
        """The outcome against the base, and against a previous adapter or a file of scores."""
        systems = {"base": self.candidate.base, "candidate": self.candidate.source}
        baseline = None if previous is None else previous.source
        request = self._request(systems if baseline is None else {**systems, "parent": baseline})
        request.scorecard.parent.mkdir(parents=True, exist_ok=True)
        if scores is None:
            scorecard = self._evaluate(request)
        else:  # the file holds the base's scores, too: the candidate alone is asked
            committed = read_baseline(scores)
            baseline = replace(self.candidate.source, name=scores.name, digest=committed.digest)
            alone = replace(request, systems={"candidate": self.candidate.source})
            scorecard = with_baseline(scores, committed, self.tasks, self._evaluate(alone), self.candidate.base.digest)
        verdict = self._judged(request, scorecard, baseline)
        folder = request.scorecard.parent
        write_verdict(folder / "verdict.json", verdict)
        ledger.record(Path(self.gating.output_root), folder, self._judgement(folder, verdict, baseline))
        if self.gating.update_baseline:
            self._update(verdict, scorecard)
        return Outcome(candidate=self.candidate, verdict=verdict, folder=folder, rows=scorecard.rows)

    def _evaluate(self, request: GateRequest) -> Scorecard:
        progress = EvaluationProgress(self.display, "gate")
        try:
            return score_systems(self.host, request, progress)
        finally:
            progress.stop()

    def _request(self, systems: Mapping[str, ModelSource]) -> GateRequest:
        root = Path(self.gating.output_root)
        key = digest_of([self.candidate.source.digest, sorted(source.digest for source in systems.values())])
        return GateRequest(
            stage=self.candidate.source.name,
            # a baseline is compared on every document: an early decision is about lifts, over the baseline as well
            gate=self.gating.gate
            if self.gating.baseline is None
            else replace(self.gating.gate, sequential=Sequential.none),
            tasks=self.tasks,
            systems=systems,
            dtype=self.candidate.dtype,
            cache=root / "cache",
            scorecard=root / ledger.GATES / f"{self.name}-{key[:12]}" / "scorecard.jsonl",
        )

    def _judged(self, request: GateRequest, scorecard: Scorecard, baseline: ModelSource | None) -> Verdict:
        """By the gate's own rules against the base; no task may be worse than the baseline's by ``max_drop``."""
        if baseline is None:
            return decide_candidate(self.host, request, scorecard)
        compared = replace(request, systems={**request.systems, "parent": baseline})
        kept = replace(
            compared,
            gate=replace(request.gate, against=["parent"]),
            tasks={name: replace(task, role=Role.guard) for name, task in request.tasks.items()},
        )
        over_base = replace(compared, gate=replace(request.gate, against=["base"]))
        return _both(*(decide_candidate(self.host, asked, scorecard) for asked in (over_base, kept)))

    def _judgement(self, folder: Path, verdict: Verdict, baseline: ModelSource | None) -> ledger.Judgement:
        """The verdict as the ledger records it; what posttrain has not trained has no lineage but its kind."""
        base, source = self.candidate.base, self.candidate.source
        return ledger.Judgement(
            run=f"{ledger.GATES}/{folder.name}",
            recipe=self.name,
            stage=source.name,
            lineage=source.lineage or ("weights" if source.adapter is None else "adapter",),
            base=BaseWeights(name=base.base, digest=base.model_digest),
            parent=(baseline or base).digest,
            artifact=source.digest,
            verdict=verdict,
        )

    def _update(self, verdict: Verdict, scorecard: Scorecard) -> None:
        """Write the baseline; an adapter that does not pass is none."""
        path = Path(str(self.gating.baseline)).expanduser()
        if verdict.state != "pass":
            self.display.line("gate", "", f"{path} is left as it was: the adapter did not pass")
            return
        write_baseline(path, baseline_of(self.name, self.gating.adapter, self.asked, self.tasks, scorecard))
        self.display.line("gate", "", f"wrote {path}")


def _both(one: Verdict, other: Verdict) -> Verdict:
    """Two verdicts as one: the worse of the two."""
    state = worst([one.state, other.state])
    deciding = dict.fromkeys(verdict.reason for verdict in (one, other) if verdict.state == state)
    return Verdict(state=state, gated=one.gated, tasks=(*one.tasks, *other.tasks), reason="; ".join(deciding))
