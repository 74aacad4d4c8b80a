"""One gate about one existing adapter or model: read, compared, judged; nothing is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain import environment, ledger
from posttrain.artifact import BaseWeights, ModelSource
from posttrain.chat_template import DATE
from posttrain.config.regression import RegressionConfig
from posttrain.config.schema import GateConfig, GateTask, Role, Sequential
from posttrain.digests import digest_of, file_digest
from posttrain.gate.procedure import decide_candidate, score_systems
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard, Verdict
from posttrain.gate.verdict import join
from posttrain.host.plugins import Host
from posttrain.launch.gate import gate_group
from posttrain.model import llama
from posttrain.regression.baseline import (
    Baseline,
    add_baseline,
    make_baseline,
    read_baseline,
    require_same_asked,
    write_baseline,
)
from posttrain.regression.candidate import Candidate, read_candidate, require_same_ground
from posttrain.regression.gguf import is_file, read_file, require_same_model
from posttrain.run.display import Display, EvaluationProgress
from posttrain.run.verdict import VERDICT, write_verdict
from posttrain.saved import plain
from posttrain.scoring.code import task_digests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The verdict about a candidate, and the folder of its scores."""

    candidate: Candidate
    verdict: Verdict
    folder: Path
    """Holds scorecard.jsonl, questions.jsonl and verdict.json."""
    rows: tuple[DocumentScore, ...]
    """Every score of base, candidate and baseline."""


def is_scores(baseline: str) -> bool:
    """Return whether a baseline is a file of scores rather than the directory of an adapter."""
    return baseline.endswith(".json")


def judge_adapter(
    name: str, settings: RegressionConfig, tasks: Mapping[str, GateTask], host: Host, display: Display
) -> Outcome:
    """Judge an adapter or model against its base and, where one is given, against a baseline.

    Raises GateFailed when it computes the same as its base, BadInput when it and the baseline cannot be compared,
    ArtifactDamaged when it is an artifact that its manifest does not match.
    """
    ledger.check(Path(settings.output_root))
    file = _baseline_file(settings)
    committed = None if file is None else read_baseline(file)
    # Scores of another day are compared on that day's prompts.
    day = None if committed is None else committed.asked.get("template_variables", {}).get(DATE)
    candidate = _read_candidate(settings, day)
    adapter = _read_baseline_adapter(settings, candidate)
    # torch is imported only now: every mistake found so far costs no wait
    with environment.importing():
        from posttrain.regression import changes

    candidate = changes.with_brought_rows(candidate)
    adapter = adapter and changes.with_brought_rows(adapter)
    tokenizer = changes.require_tokenizer(candidate)
    if adapter is not None:
        changes.require_same_tokenizer(tokenizer, adapter)
    compute = _compute_dtype(settings, candidate, adapter, committed)
    conditions = _conditions(settings, candidate, tokenizer, compute)
    noted = require_same_asked(file, committed, conditions) if file is not None and committed is not None else ()
    if candidate.source.llama:
        require_same_model(candidate, tokenizer.get_vocab())
    else:
        changes.require_change(candidate)
    return _Regression(name, settings, tasks, host, display, candidate, compute, conditions, noted).judge(adapter, file)


def _read_candidate(settings: RegressionConfig, day: str | None) -> Candidate:
    path = Path(settings.adapter)
    if is_file(settings.adapter):
        return read_file(path, settings.model, Path(settings.output_root), day)
    return read_candidate(path, settings.model, day)


def _read_baseline_adapter(settings: RegressionConfig, candidate: Candidate) -> Candidate | None:
    """Read the baseline's adapter, on the base of the candidate; None unless ``baseline`` is a directory."""
    if settings.baseline is None or is_scores(settings.baseline):
        return None
    base = replace(settings.model, path=str(candidate.base.model), revision=None)
    adapter = read_candidate(Path(settings.baseline), base, candidate.base.template_variables.get(DATE))
    require_same_ground(candidate, adapter)
    return adapter


def _baseline_file(settings: RegressionConfig) -> Path | None:
    """Return the baseline file to compare with; None when there is none, or when it is only being written."""
    if settings.baseline is None or not is_scores(settings.baseline) or settings.update_baseline:
        return None
    return Path(settings.baseline).expanduser()


def _compute_dtype(
    settings: RegressionConfig, candidate: Candidate, adapter: Candidate | None, committed: Baseline | None
) -> str:
    """Return the number format of the arithmetic: that of the baseline's scores, else the faster one."""
    from posttrain.scoring.systems import compute_dtype

    if committed is not None:
        return str(committed.asked.get("compute_dtype", candidate.dtype))
    systems = [each.source for each in (candidate, adapter) if each is not None]
    return compute_dtype(settings.gate.backend, candidate.dtype, systems)


def _conditions(
    settings: RegressionConfig, candidate: Candidate, tokenizer: PreTrainedTokenizerBase, compute: str
) -> dict[str, Any]:
    """Return everything, apart from the tasks, that has to be equal for scores to be comparable."""
    from posttrain.model.device import default_device
    from posttrain.scoring.fingerprint import library_versions, tokenizer_digest

    variables, of_llama = candidate.source.template_variables, candidate.source.llama
    return {
        **({"template_variables": dict(variables)} if variables else {}),
        "base": candidate.base.model_digest,
        "chat_template": hashlib.sha256(candidate.source.chat_template.encode()).hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "dtype": candidate.dtype,
        **({"compute_dtype": compute} if compute != candidate.dtype else {}),
        "quantization": candidate.source.quantization,
        "backend": settings.gate.backend.value,
        "batch_size": settings.gate.batch_size,
        "seed": settings.gate.seed,
        "device": default_device().type,
        "versions": {**library_versions(), **({llama.PACKAGE: llama.version()} if of_llama else {})},
    }


@dataclass(frozen=True)
class _Regression:
    """One gate about one candidate."""

    name: str
    settings: RegressionConfig
    tasks: Mapping[str, GateTask]
    host: Host
    display: Display
    candidate: Candidate
    compute_dtype: str
    """Number format of the arithmetic."""
    conditions: Mapping[str, Any]
    noted: Sequence[str] = ()
    """Differences from the baseline that change no score."""

    def judge(self, adapter: Candidate | None, file: Path | None) -> Outcome:
        """Judge the candidate against its base, and against the baseline: an adapter or a file of its scores."""
        systems = {"base": self.candidate.base, "candidate": self.candidate.source}
        baseline = None if adapter is None else adapter.source
        request = self._request(systems if baseline is None else {**systems, "baseline": baseline})
        request.scorecard.parent.mkdir(parents=True, exist_ok=True)
        request.scorecard.with_name(VERDICT).unlink(missing_ok=True)  # it rests on scores that are about to change
        if file is None:
            scorecard, scored_by = self._score(request)
        else:  # the file holds the base's scores, too: only the candidate is asked
            committed = read_baseline(file)
            baseline = replace(self.candidate.source, name=file.name, digest=committed.digest)
            alone = replace(request, systems={"candidate": self.candidate.source})
            scores, scored_by = self._score(alone)
            scorecard = add_baseline(file, committed, self.tasks, scores, self.candidate.base.digest)
        requests = self._requests(request, baseline)
        verdict = join([decide_candidate(self.host, asked, scorecard, scored_by) for asked in requests])
        verdict = replace(verdict, notes=(*verdict.notes, *self.noted))
        folder = request.scorecard.parent
        write_verdict(folder / VERDICT, verdict, requests, scorecard)
        ledger.record(Path(self.settings.output_root), folder, self._judgement(folder, verdict, baseline))
        if self.settings.update_baseline:
            self._update_baseline(verdict, scorecard)
        return Outcome(candidate=self.candidate, verdict=verdict, folder=folder, rows=scorecard.rows)

    def _score(self, request: GateRequest) -> tuple[Scorecard, tuple[str, ...]]:
        progress = EvaluationProgress(self.display, "gate")
        try:
            return score_systems(self.host, request, progress)
        finally:
            progress.stop()

    def _request(self, systems: Mapping[str, ModelSource]) -> GateRequest:
        root, gate = Path(self.settings.output_root), self.settings.gate
        # A baseline is compared on every document: with one, a sequential gate looks once.
        if self.settings.baseline is not None:
            gate = replace(gate, sequential=Sequential.none)
        return GateRequest(
            stage=self.candidate.source.name,
            gate=gate,
            tasks=self.tasks,
            systems=systems,
            dtype=self.candidate.dtype,
            compute_dtype=self.compute_dtype,
            cache=root / "cache",
            scorecard=root / ledger.GATES / self._folder_name(systems, gate) / "scorecard.jsonl",
            launch=gate_group(self.settings.launch),
        )

    def _folder_name(self, systems: Mapping[str, ModelSource], gate: GateConfig) -> str:
        """Return the name of the evidence's folder: of its own for each gate, whatever differs behind one name."""
        file = _baseline_file(self.settings)
        content = {
            "name": self.name,
            "gate": plain(gate),
            "tasks": {name: plain(task) for name, task in self.tasks.items()},
            "files": {name: task_digests(task.task or name, task.data) for name, task in self.tasks.items()},
            "systems": {role: source.digest for role, source in systems.items()},
            "baseline": None if file is None else file_digest(file),
            "conditions": self.conditions,
        }
        return f"{Path(self.name).name}-{digest_of(content)[:12]}"

    def _requests(self, request: GateRequest, baseline: ModelSource | None) -> list[GateRequest]:
        """Return the gate's own roles against the base, and every task as a guard against the baseline."""
        if baseline is None:
            return [request]
        compared = replace(request, systems={**request.systems, "baseline": baseline})
        over_base = replace(compared, gate=replace(request.gate, against=["base"]))
        over_baseline = replace(
            compared,
            gate=replace(request.gate, against=["baseline"]),
            tasks={name: replace(task, role=Role.guard) for name, task in request.tasks.items()},
        )
        return [over_base, over_baseline]

    def _judgement(self, folder: Path, verdict: Verdict, baseline: ModelSource | None) -> ledger.Judgement:
        """Return the verdict in the ledger's form; the lineage of a foreign adapter is its kind alone."""
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
            tried=self.settings.gate.chosen_from,
        )

    def _update_baseline(self, verdict: Verdict, scorecard: Scorecard) -> None:
        """Write the baseline file, unless the adapter did not pass."""
        path = Path(str(self.settings.baseline)).expanduser()
        if verdict.state != "pass":
            self.display.line("gate", "", f"{path} is left as it was: the adapter did not pass")
            return
        write_baseline(path, make_baseline(self.name, self.settings.adapter, self.conditions, self.tasks, scorecard))
        self.display.line("gate", "", f"wrote {path}")
