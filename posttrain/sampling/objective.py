"""The loss of answers that the policy itself writes, step by step, as the loop takes it.

    draw       the policy, as it is when the step begins, answers the step's questions; rewards, then advantages;
               where the loss asks, the log-probabilities of every token by the model before training
    batch      prompts, each once for all of its answers, packed end to end; nothing padded
    share      log-probabilities of every token by the policy

Every answer draws by the seed, the sampling, its question and its number: a resumed run writes what it would have
written, and several processes write what one does.
"""

# N = tokens of all answers of a batch, A = answers of a batch

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.cost.operations import Work
from posttrain.digests import digest_of
from posttrain.engine import processes
from posttrain.engine.ahead import on_device
from posttrain.engine.answers import AnswerBatch
from posttrain.engine.attention import shares_prompts
from posttrain.engine.batches import deal, rows_per_batch
from posttrain.engine.config import SampledConfig
from posttrain.engine.start import TOLERANCE
from posttrain.errors import ArtifactDamaged
from posttrain.sampling.policy import Asked, Policy
from posttrain.sampling.sampler import Answer, Drawing
from posttrain.sampling.trail import Trail

if TYPE_CHECKING:
    from posttrain.engine.engine import Engine
    from posttrain.engine.objective import Sums, Totals


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredQuestion:
    """A question with the answers that the policy wrote in a step."""

    asked: Asked
    """The question with its prompt."""
    answers: Sequence[Answer]
    """Answers of the policy, in the order of sampling."""
    rewards: Sequence[float]
    """Reward of each answer."""
    advantages: Sequence[float]
    """Advantage of each answer over the others, as the loss has it."""
    reference: Sequence[float] = ()
    """Log-probability of each token of the answers, one after another, by the model before training; empty for a loss
    without a reference."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """The log-probabilities of the tokens of a batch's answers at the temperature of sampling, in nats."""

    rows: Sequence[AnsweredQuestion]
    """The questions of the batch with their A answers of N tokens in all."""
    log_probs: torch.Tensor
    """Those of the policy, [N], with their graph."""
    drawn: torch.Tensor
    """Those with which the tokens were drawn, [N]."""
    reference: torch.Tensor | None
    """Those of the model before training, [N]; None for a loss without a reference."""
    advantages: torch.Tensor
    """The advantage of each token's answer, [N]."""
    owners: torch.Tensor
    """Number of each token's answer, [N]."""
    lengths: torch.Tensor
    """Tokens of each answer, [A]."""
    ended: torch.Tensor
    """True for an answer that ended by itself, [A]."""


class PolicyLoss(Protocol):
    """A loss of sampled answers, as a function of their tokens' log-probabilities; a sum over an optimizer step."""

    @property
    def referenced(self) -> bool:
        """True when the loss compares the policy with the model before training."""

    def advantages(self, rewards: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
        """Return the advantage of each answer of a step, from the rewards of each question's answers."""

    def totals(self, rows: Sequence[AnsweredQuestion]) -> Mapping[str, int]:
        """Count what the loss of a whole step is divided by."""

    def share(self, scores: TokenScores, totals: Mapping[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the share of a batch in the loss of the step, and sums for its figures, always of the same names."""

    def figures(self, sums: Mapping[str, float], totals: Mapping[str, int]) -> dict[str, float]:
        """Return the figures of a step, ``loss`` among them, from the sums over all of its batches."""


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Answered questions laid out for one forward pass, on their device."""

    rows: Sequence[AnsweredQuestion]
    answered: AnswerBatch
    drawn: torch.Tensor
    """Log-probabilities with which the tokens were drawn, [N]."""
    reference: torch.Tensor | None
    """Those by the model before training, [N]; None for a loss without a reference."""
    advantages: torch.Tensor
    """Advantage of each answer, [A]."""
    ended: torch.Tensor
    """True for an answer that ended by itself, [A]."""


@dataclass
class SampledObjective:
    """The loss of a stage's sampled answers."""

    config: SampledConfig
    dtype: str
    """Number format of the arithmetic."""
    _: KW_ONLY
    loss: PolicyLoss
    policy: Policy
    first: Sequence[Asked]
    """Questions by whose answers the start is proven."""
    seed: int
    stored: str
    """Number format of the stored weights."""
    trail: Trail
    shuffled = True
    drawn = True
    shared: bool = field(default=False, init=False)
    _engine: Engine | None = field(default=None, init=False)
    _before: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    """Trained weights before training, as this process holds them, for a loss with a reference."""
    _drawn: tuple[int, Sequence[AnsweredQuestion]] | None = field(default=None, init=False)
    """Number of the last sampling, and its questions with their answers."""
    _begins: bool = field(default=False, init=False)
    """True in the first of the ``updates`` on a sampling."""

    @property
    def coupled(self) -> bool:
        """As the settings have it."""
        return self.config.coupled

    def begin(self, engine: Engine) -> None:
        """Keep the model before training, and prove that the loop gives tokens the chances they were drawn with.

        Raises ArtifactDamaged when the proof fails.
        """
        self._engine = engine
        self.shared = engine.run(partial(shares_prompts, engine.model))
        times = "once for all of its answers" if self.shared else "again for each answer, as the kernel needs it"
        self.policy.progress.note(f"prompts: each is computed {times}")
        if self.loss.referenced:
            self._before = {name: each.clone() for name, each in engine.parts().items()}
        self._prove_start(engine)

    def draw(self, step: int, rows: Sequence[Asked]) -> Sequence[AnsweredQuestion]:
        """Return the step's questions with the answers of the policy as it is, or was at the first of ``updates``."""
        sampling = -(-step // self.config.updates)
        self._begins = (step - 1) % self.config.updates == 0
        if self._drawn is None or self._drawn[0] != sampling:
            assert self._engine is not None
            groups = self.policy.answer(self._engine, self.dtype, rows, self._drawing(sampling))
            rewards = [[each.reward for each in group] for group in groups]
            advantages = self.loss.advantages(rewards)
            self.trail.write(sampling, rows, groups, advantages)
            answered = [
                AnsweredQuestion(asked=asked, answers=[each.answer for each in group], rewards=given, advantages=better)
                for asked, group, given, better in zip(rows, groups, rewards, advantages, strict=True)
            ]
            self._drawn = (sampling, self._referenced(answered) if self.loss.referenced else answered)
        return self._drawn[1]

    def totals(self, rows: Sequence[AnsweredQuestion]) -> Totals:
        """Count the tokens of a step, a prompt once, its answers, and what the loss counts."""
        held = sum(len(row.asked.prompt) + sum(len(answer.ids) for answer in row.answers) for row in rows)
        return {"tokens": held, "answers": sum(len(row.answers) for row in rows), **self.loss.totals(rows)}

    def work(self, rows: Sequence[AnsweredQuestion]) -> Sequence[Work]:
        """Return the prompts with their answers, each prompt once; the reference has them once a sampling."""
        families = [(len(row.asked.prompt), [len(answer.ids) for answer in row.answers]) for row in rows]
        scored = sum(sum(answers) for _, answers in families)
        graphs = (True, False) if self.loss.referenced and self._begins else (True,)
        return [Work(families=families, scored=scored, graph=graph) for graph in graphs]

    def batch(self, rows: Sequence[AnsweredQuestion], device: torch.device) -> PolicyBatch:
        """Return ``rows`` end to end, with their advantages."""
        answered = [(row.asked.prompt, [answer.ids for answer in row.answers]) for row in rows]
        answers = [answer for row in rows for answer in row.answers]
        drawn = [value for answer in answers for value in answer.log_probs]
        before = [value for row in rows for value in row.reference]
        return PolicyBatch(
            rows=rows,
            answered=AnswerBatch.of(answered, device, self.shared),
            drawn=on_device(torch.tensor(drawn), device),
            reference=on_device(torch.tensor(before), device) if before else None,
            advantages=on_device(torch.tensor([value for row in rows for value in row.advantages]), device),
            ended=on_device(torch.tensor([answer.ended for answer in answers]), device),
        )

    def share(
        self, model: PreTrainedModel | PeftModel, batch: PolicyBatch, totals: Totals
    ) -> tuple[torch.Tensor, Sums]:
        """Return the share of ``batch`` in the loss of the step."""
        return self.loss.share(self.scores(model, batch), totals)

    def scores(self, model: PreTrainedModel | PeftModel, batch: PolicyBatch) -> TokenScores:
        """Return the log-probabilities of the tokens of ``batch``."""
        owners = batch.answered.owners
        return TokenScores(
            rows=batch.rows,
            log_probs=self._log_probs(model, batch),
            drawn=batch.drawn,
            reference=batch.reference,
            advantages=batch.advantages[owners],
            owners=owners,
            lengths=batch.answered.tokens.flatten(),
            ended=batch.ended,
        )

    def figures(self, sums: Mapping[str, float], totals: Totals) -> dict[str, float]:
        """Return the figures of the loss, and of the answers behind it.

        Raises BadInput when no question's answers have differed in their rewards for ``idle_steps`` samplings.
        """
        sampling, rows = (0, ()) if self._drawn is None else self._drawn
        answers = [answer for row in rows for answer in row.answers]
        spread = fmean(len(set(row.rewards)) > 1 for row in rows)
        reward = fmean(value for row in rows for value in row.rewards)
        if not spread:
            self.trail.require_spread(sampling, self.config.idle_steps)
        return {
            **self.loss.figures(sums, totals),
            "reward": reward,
            "spread": spread,
            "entropy": fmean(answer.entropy for answer in answers),
            "cut": fmean(not answer.ended for answer in answers),
            "answer_tokens": fmean(len(answer.ids) for answer in answers),
        }

    def content(self, row: Asked) -> bytes:
        """Return the prompt's token ids, and what the rewards know of the question."""
        asked = row.question
        return repr((list(row.prompt), list(asked.answers), asked.match, dict(asked.meta))).encode()

    def _log_probs(self, model: PreTrainedModel | PeftModel, batch: PolicyBatch) -> torch.Tensor:
        return batch.answered.token_log_probs(model, self.config, self.dtype, temperature=self.config.temperature)

    @torch.no_grad()
    def _referenced(self, rows: Sequence[AnsweredQuestion]) -> Sequence[AnsweredQuestion]:
        """Return ``rows`` with their reference, in the batches of training; the processes share the forward passes."""
        assert self._engine is not None
        engine, size = self._engine, rows_per_batch(self.config, processes.world())
        sizes = [sum(len(answer.ids) for answer in row.answers) for row in rows]
        ends = [*accumulate(sizes, initial=0)]
        found_N = torch.zeros(ends[-1], dtype=torch.float64)
        starts = range(0, len(rows), size)
        with self._as_before(engine):
            for index, counts in deal(len(starts), processes.rank(), processes.world()):
                first, last = starts[index], min(starts[index] + size, len(rows))
                batch = self.batch(rows[first:last], engine.model.device)
                log_probs_N = engine.run(partial(self._log_probs, engine.model, batch))
                if counts:
                    found_N[ends[first] : ends[last]] = log_probs_N.cpu()
        parts = processes.total(found_N).split(sizes)
        return [replace(row, reference=part.tolist()) for row, part in zip(rows, parts, strict=True)]

    @contextlib.contextmanager
    def _as_before(self, engine: Engine) -> Iterator[None]:
        """Give the model its weights from before training for a while; no second model is in memory."""
        self._swap(engine)
        try:
            yield
        finally:
            self._swap(engine)

    def _swap(self, engine: Engine) -> None:
        """Exchange the numbers of the trained weights with those from before training, where they lie."""
        for name, part in engine.parts().items():
            now = part.clone()
            part.copy_(self._before[name])
            self._before[name].copy_(now)

    def _drawing(self, sampling: int) -> Drawing:
        return Drawing(
            k=self.config.k,
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
            seed=int(digest_of([self.seed, sampling])[:15], 16),
        )

    @torch.no_grad()
    def _prove_start(self, engine: Engine) -> None:
        """Raise ArtifactDamaged unless the loop gives sampled tokens the log-probabilities they were drawn with."""
        # no more than a batch of training: in another one, the reference would differ by rounding
        first = self.first[: rows_per_batch(self.config, processes.world())]
        answers = self.policy.write(engine, self.dtype, first, self._drawing(0))
        rows = [
            AnsweredQuestion(asked=asked, answers=group, rewards=[0.0] * len(group), advantages=[0.0] * len(group))
            for asked, group in zip(first, answers, strict=True)
        ]
        training = engine.model.training
        engine.model.eval()
        if self.loss.referenced:
            rows = [*self._referenced(rows)]
        scores = engine.run(partial(self.scores, engine.model, self.batch(rows, engine.model.device)))
        engine.model.train(training)
        apart = float((scores.log_probs - scores.drawn).abs().mean())
        allowed = TOLERANCE[self.stored] / min(1.0, self.config.temperature)
        if not apart <= allowed:
            raise ArtifactDamaged(
                f"the loop gives the policy's own answers other log-probabilities than they were drawn with: "
                f"{apart:.2g} nats a token, allowed {allowed:.2g}; nothing was trained"
            )
        # process 0 has computed the reference: another kind of device may round otherwise
        moved = scores.reference is not None and bool((scores.log_probs != scores.reference).any())
        if processes.agree(moved and processes.rank() == 0):
            raise ArtifactDamaged("the reference is not the model before training; nothing was trained")
