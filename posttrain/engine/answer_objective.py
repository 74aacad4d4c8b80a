"""The loss of answers on the loop: their log-probabilities by the policy, and by the model before training."""

# B = rows of a batch, R = all rows, A = answers of a row, D = eval rows

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.cost.operations import Work
from posttrain.digests import digest_of
from posttrain.engine import processes
from posttrain.engine.ahead import on_device
from posttrain.engine.answers import AnswerBatch, AnsweredRow, AnswerScores
from posttrain.engine.attention import shares_prompts
from posttrain.engine.batches import deal
from posttrain.engine.config import LoopConfig
from posttrain.engine.evaluation import Evaluation
from posttrain.engine.references import ReferenceFolder, References
from posttrain.engine.start import Start
from posttrain.model.device import exact_device
from posttrain.stage import Progress
from posttrain.tokens.best_fit import best_fit

if TYPE_CHECKING:
    from posttrain.engine.engine import Engine
    from posttrain.engine.objective import Sums, Totals

Row = TypeVar("Row", bound=AnsweredRow)
COMPUTING = ("posttrain", "torch", "transformers", "peft")
"""Distributions whose versions are part of a reference's key."""


class AnswerLoss(Protocol):
    """A loss of answers, as a function of their log-probabilities; a sum over the rows of an optimizer step."""

    @property
    def referenced(self) -> bool:
        """True when the loss compares the policy with the model before training."""

    @property
    def coupled(self) -> bool:
        """True when the rows of a batch meet in the loss."""

    @property
    def shuffled(self) -> bool:
        """True to draw the rows in another order every epoch; False to train them in the order given."""

    def totals(self, rows: Sequence[Any]) -> Mapping[str, int]:
        """Count the rows of a whole step: what its loss is divided by."""

    def share(self, scores: AnswerScores, totals: Mapping[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the share of a batch in the loss of the step, and sums for its figures, always of the same names."""

    def figures(self, sums: Mapping[str, float], totals: Mapping[str, int]) -> dict[str, float]:
        """Return the figures of a step, ``loss`` among them, from the sums over all of its batches."""


@dataclass(frozen=True, slots=True)
class Numbered(Generic[Row]):
    """A row with its place among all rows of a stage, by which its reference is found."""

    number: int
    row: Row


@dataclass(frozen=True, kw_only=True)
class AnswerInputs:
    """Rows laid out for one forward pass, or two, on their device."""

    rows: Sequence[Any]
    answered: AnswerBatch
    aside: AnswerBatch | None
    """The answers aside; None where there are none."""
    reference: torch.Tensor | None
    """Log-probabilities by the model before training, [B, A]."""
    aside_reference: torch.Tensor | None
    """Those of the answers aside, [B]."""


@dataclass
class AnswerObjective(Generic[Row]):
    """The loss of a stage's answers, as the loop takes it."""

    config: LoopConfig
    dtype: str
    """Number format of the arithmetic: ``float32`` or ``bfloat16``."""
    _: KW_ONLY
    loss: AnswerLoss
    start: Start[Row]
    rows: Sequence[Numbered[Row]]
    """All rows, trained and measured, by their numbers."""
    references: Path
    """Folder of the kept log-probabilities by the model before training."""
    parent: str
    """Digest of that model."""
    progress: Progress
    shared: bool = field(default=False, init=False)
    """True when a prompt is held once for all of its answers."""
    before: References | None = field(default=None, init=False)
    """Log-probabilities by the model before training."""

    drawn = False

    def draw(self, step: int, rows: Sequence[Numbered[Row]]) -> Sequence[Numbered[Row]]:
        """Return ``rows``."""
        return rows

    @property
    def coupled(self) -> bool:
        """As the loss is."""
        return self.loss.coupled

    @property
    def shuffled(self) -> bool:
        """As the loss wants."""
        return self.loss.shuffled

    def begin(self, engine: Engine) -> None:
        """Take the log-probabilities before training, kept or from the engine's model, and prove the start.

        The model has to be the parent, with nothing trained and nothing resumed. Raises ArtifactDamaged when a proof
        fails.
        """
        self.shared = engine.run(partial(shares_prompts, engine.model))
        times = "once for all of its answers" if self.shared else "again for each answer, as the kernel needs it"
        self.progress.note(f"prompts: each is computed {times}")
        training = engine.model.training
        engine.model.eval()
        first = self.rows[: len(self.start.rows)]
        if self.loss.referenced:
            self.before = self._kept_or_computed(engine)
            self.start.prove_reference(self.before.answers[: len(first)].tolist())
        with torch.no_grad():
            batch = self.batch(first, engine.model.device)
            loss, _ = engine.run(partial(self.share, engine.model, batch, self.totals(first)))
        engine.model.train(training)
        self.start.prove_loss(float(loss))

    def totals(self, rows: Sequence[Numbered[Row]]) -> Totals:
        """Count the tokens of a step, a prompt once, and what the loss counts."""
        return {"tokens": sum(_held(each.row) for each in rows), **self.loss.totals([each.row for each in rows])}

    def work(self, rows: Sequence[Numbered[Row]]) -> Sequence[Work]:
        """Return the prompts with their answers, each prompt once, and those with their answers aside."""
        answered = [(len(each.row.prompt), [len(ids) for _, ids in each.row.answers]) for each in rows]
        aside = [(len(each.row.prompt), [len(each.row.aside)]) for each in rows if each.row.aside]
        return [
            Work(families=families, scored=sum(sum(answers) for _, answers in families), graph=graph)
            for families, graph in ((answered, True), (aside, False))
        ]

    def batch(self, rows: Sequence[Numbered[Row]], device: torch.device) -> AnswerInputs:
        """Return ``rows`` end to end, with what the model before training gave them."""
        numbers = [each.number for each in rows]
        answered = [(each.row.prompt, [ids for _, ids in each.row.answers]) for each in rows]
        aside = [(each.row.prompt, [each.row.aside]) for each in rows] if all(each.row.aside for each in rows) else []
        exact = exact_device(device)  # the references are float64
        return AnswerInputs(
            rows=[each.row for each in rows],
            answered=AnswerBatch.of(answered, device, self.shared),
            aside=AnswerBatch.of(aside, device, self.shared) if aside else None,
            reference=None if self.before is None else on_device(self.before.answers[numbers], exact),
            aside_reference=on_device(self.before.aside[numbers], exact) if aside and self.before else None,
        )

    def share(
        self, model: PreTrainedModel | PeftModel, batch: AnswerInputs, totals: Totals
    ) -> tuple[torch.Tensor, Sums]:
        """Return the share of ``batch`` in the loss of the step."""
        return self.loss.share(self.scores(model, batch), totals)

    def scores(self, model: PreTrainedModel | PeftModel, batch: AnswerInputs) -> AnswerScores:
        """Return the log-probabilities of the answers of ``batch``."""
        aside = self._aside(model, batch)  # first: what it holds in memory is freed before the pass with a gradient
        log_probs_BA = batch.answered.log_probs(model, self.config, self.dtype, self.config.neftune_alpha)
        return AnswerScores(
            rows=batch.rows,
            log_probs=log_probs_BA,
            tokens=batch.answered.tokens.to(log_probs_BA.device),
            reference=batch.reference,
            aside=aside,
            aside_reference=batch.aside_reference,
        )

    def figures(self, sums: Mapping[str, float], totals: Totals) -> dict[str, float]:
        """Return the figures of the loss."""
        return self.loss.figures(sums, totals)

    def content(self, row: Numbered[Row]) -> bytes:
        """Return names and token ids of the row; not its place in a file."""
        named = [("", row.row.prompt), *row.row.answers, ("", row.row.aside)]
        lengths = repr([(name, len(ids)) for name, ids in named]).encode()
        return lengths + b"".join(array("i", ids).tobytes() for _, ids in named)

    @torch.no_grad()
    def _aside(self, model: PreTrainedModel | PeftModel, batch: AnswerInputs) -> torch.Tensor | None:
        """Return the log-probabilities [B] of the answers aside; None where there are none."""
        return None if batch.aside is None else batch.aside.log_probs(model, self.config, self.dtype)[:, 0]

    def _kept_or_computed(self, engine: Engine) -> References:
        folder = ReferenceFolder(self.references, self._key(), self.progress.note)
        found = folder.read() if processes.rank() == 0 else None
        if processes.agree(found is not None):
            self.progress.note("reference log-probabilities: kept from an earlier run")
        else:
            found = self._computed(engine)
            if processes.rank() == 0:
                folder.write(found)
        return self._from_first(found)

    def _from_first(self, found: References | None) -> References:
        """Return on every process what process 0 has."""
        shape = (len(self.rows), len(self.rows[0].row.answers))
        empty = References(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64))
        mine = found if found is not None and processes.rank() == 0 else empty
        return References(processes.total(mine.answers), processes.total(mine.aside))

    @torch.no_grad()
    def _computed(self, engine: Engine) -> References:
        """Return the log-probabilities of all rows by the engine's model; the processes share the forward passes."""
        answers_RA = torch.zeros(len(self.rows), len(self.rows[0].row.answers), dtype=torch.float64)
        aside_R = torch.zeros(len(self.rows), dtype=torch.float64)
        groups = best_fit(
            [_held(each.row) for each in self.rows],
            max(
                *(_held(each.row) for each in self.rows),
                self.config.sequence_length * self.config.per_device_batch_size,
            ),
        )
        done = 0
        for index, counts in deal(len(groups), processes.rank(), processes.world()):
            chosen = [self.rows[each] for each in groups[index]]
            log_probs_BA, aside_B = engine.run(partial(self._both, engine.model, chosen))
            if counts:
                answers_RA[groups[index]] = log_probs_BA
                aside_R[groups[index]] = aside_B
            done = min(done + len(chosen) * processes.world(), len(self.rows))
            self.progress.part(done, len(self.rows), "reference row")
        return References(processes.total(answers_RA), processes.total(aside_R))

    def _both(
        self, model: PreTrainedModel | PeftModel, rows: Sequence[Numbered[Row]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch(rows, model.device)
        aside_B = self._aside(model, batch)
        log_probs_BA = batch.answered.log_probs(model, self.config, self.dtype).cpu()
        return log_probs_BA, torch.zeros(len(rows), dtype=torch.float64) if aside_B is None else aside_B.cpu()

    def _key(self) -> str:
        rows = sha256()
        for each in self.rows:
            rows.update(self.content(each))
        versions = {name: version(name) for name in COMPUTING}
        settings = {"dtype": self.dtype, "stored": self.start.dtype, "versions": versions}
        return digest_of({"parent": self.parent, "rows": rows.hexdigest(), **settings})


@dataclass(kw_only=True)
class AnswerEvaluation(Evaluation):
    """Measures the loss of answers set aside from training, as a mean over their rows."""

    rows: Sequence[Any]
    objective: AnswerObjective[Any] = field(init=False, repr=False)
    """The loss of the training."""

    @torch.no_grad()
    def losses(self, engine: Engine, dtype: str, report: Callable[[int, int], None] | None = None) -> torch.Tensor:
        """Return the share of each row in the loss of all, times their number, [D] in float64.

        Rows that meet in the loss have equal shares of that of their batch.
        """
        objective, size, count = self.objective, self.config.per_device_batch_size, len(self.rows)
        totals = objective.totals(self.rows)
        found: list[tuple[list[int], torch.Tensor]] = []
        training, done = engine.model.training, 0
        engine.model.eval()
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        for index, counts in deal(len(batches), processes.rank(), processes.world()):
            chosen = [self.rows[place] for place in batches[index]]
            batch = objective.batch(chosen, engine.model.device)
            scores = engine.run(partial(objective.scores, engine.model, batch))
            step = len(chosen) if objective.coupled else 1
            for start in range(0, len(chosen) if counts else 0, step):
                part = slice(start, start + step)
                loss, _ = objective.loss.share(scores.part(part), totals)
                found.append((list(batches[index][part]), loss * count / step))
            done = min(done + len(chosen) * processes.world(), count)
            if report is not None:
                report(done, count)
        engine.model.train(training)
        sums_D = torch.zeros(count, dtype=torch.float64)
        for places, loss in found:  # only here, so that no pass waits for the one before it
            sums_D[places] = float(loss)
        return processes.total(sums_D)

    def figures(self) -> dict[str, int | float]:
        """Return the eval figures of the manifest; empty when nothing was measured."""
        return {name: value for name, value in super().figures().items() if name != "eval_trained_tokens"}

    def _tokens(self) -> torch.Tensor:
        """Return 1 for each row: the loss of answers is a mean over rows."""
        return torch.ones(len(self.rows), dtype=torch.float64)


def _held(row: AnsweredRow) -> int:
    """Return the tokens of a row with its prompt held once."""
    return len(row.prompt) + sum(len(ids) for _, ids in row.answers)
