"""The proof that answers are trained right: on the user's own model and records, against plain float64.

The reference knows nothing of packing, shared prompts or chunks: every answer behind its prompt alone through the
model's own forward pass, all of its logits, one log-softmax. The loop must give the stage's loss of these
log-probabilities, and its gradient.
"""

# B = rows, A = answers of a row, N = tokens of an answer, V = vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.engine.answer_objective import AnswerLoss, AnswerObjective, Numbered
from posttrain.engine.answers import AnsweredRow, AnswerScores
from posttrain.engine.attention import causal_model, install, shares_prompts
from posttrain.engine.config import LoopConfig
from posttrain.engine.references import References
from posttrain.engine.start import Start
from posttrain.model.probe import set_attention
from posttrain.sft.proof import LIMIT, ROUNDING, Check, Gradient, distance, gradient_of, plain_experts, wake_adapter
from posttrain.stage import Progress

ROWS = 4
"""Rows of the proof."""
APART = 0.5
"""Largest distance of a reference from the policy, in nats: where both agree, some losses forget the pairs."""
Found = tuple[float, Gradient]
"""A loss and its gradient."""


def sample_rows(rows: Sequence[AnsweredRow], count: int = ROWS) -> list[AnsweredRow]:
    """Return at most ``count`` rows out of the shorter half, spread over their lengths."""
    ordered = sorted(rows, key=lambda row: len(row.prompt) + sum(len(ids) for _, ids in row.answers))
    half = ordered[: max(count, len(ordered) // 2)]
    return half[:: max(1, len(half) // count)][:count]


@dataclass(frozen=True, kw_only=True)
class AnswerProof:
    """The comparisons for one stage on answers and one model in float32. They leave the model unfit for anything."""

    stage: str
    """Name of the stage."""
    model: PreTrainedModel | PeftModel
    rows: Sequence[AnsweredRow]
    """At least one, as ``sample_rows`` returns them."""
    loss: AnswerLoss
    config: LoopConfig
    progress: Progress

    def checks(self, began: Callable[[str], object] = lambda name: None) -> Iterator[Check]:
        """Run the comparisons, in order; call ``began`` with the name of each as it begins. Dropout is off."""
        self.model.eval()
        wake_adapter(self.model)
        causal = causal_model(self.model)
        own = causal.config._attn_implementation
        began(name := f"{self.stage}: answers packed, in float32")
        self.model.double()
        with plain_experts(causal):
            exact = self._plain()
        self.model.float()
        install(self.model, self.config.packing)
        self._objective.shared = shares_prompts(self.model)
        yield Check(name=name, against="float64", error=_error(self._loop(len(self.rows)), exact), limit=ROUNDING)
        # transformers' norms compute in float32 whatever the model: here both sides have the loop's, and nothing rounds
        began(name := f"{self.stage}: answers packed, in float64")
        self.model.double()
        kernel = causal.config._attn_implementation
        with plain_experts(causal):
            set_attention(causal, own)
            exact = self._plain()
            set_attention(causal, kernel)
            size = len(self.rows) if self.loss.coupled else 1
            yield Check(name=name, against="float64", error=_error(self._loop(size), exact))

    @property
    def shared(self) -> bool:
        """True when a prompt is computed once for all of its answers."""
        return self._objective.shared

    @cached_property
    def _objective(self) -> AnswerObjective[Any]:
        rows = [Numbered(number, row) for number, row in enumerate(self.rows)]
        start = Start(stage=self.stage, rows=self.rows, log_probs=(), loss=lambda rows, log_probs: 0.0, dtype="float32")
        return AnswerObjective(
            self.config, "float32", loss=self.loss, start=start, rows=rows, references=Path(), parent="",
            progress=self.progress,
        )  # fmt: skip

    def _loop(self, size: int) -> Found:
        """Return the loss and the gradient as the loop takes them, ``size`` rows at a time."""
        objective, losses = self._objective, [0.0]
        totals = objective.totals(objective.rows)

        def add() -> None:
            for start in range(0, len(self.rows), size):
                batch = objective.batch(objective.rows[start : start + size], self.model.device)
                share, _ = objective.share(self.model, batch, totals)
                share.backward()
                losses.append(float(share.detach()))

        gradient = gradient_of(self.model, add)
        return sum(losses), gradient

    def _plain(self) -> Found:
        """Return the loss and its gradient from every answer alone; the references are taken beside its policy."""
        with torch.no_grad():
            log_probs_BA = torch.tensor(
                [[float(_log_prob(self.model, row.prompt, ids)) for _, ids in row.answers] for row in self.rows],
                dtype=torch.float64,
            )
            aside_B = torch.tensor(
                [float(_log_prob(self.model, row.prompt, row.aside)) if row.aside else 0.0 for row in self.rows],
                dtype=torch.float64,
            )
        apart_BA = torch.linspace(-APART, APART, log_probs_BA.numel(), dtype=torch.float64).view_as(log_probs_BA)
        before = References(log_probs_BA + apart_BA, aside_B + apart_BA[:, 0])
        aside = all(row.aside for row in self.rows)
        self._objective.before = before if self.loss.referenced else None
        scores = AnswerScores(
            rows=self.rows,
            log_probs=log_probs_BA.requires_grad_(),
            tokens=torch.tensor([[len(ids) for _, ids in row.answers] for row in self.rows]),
            reference=before.answers if self.loss.referenced else None,
            aside=aside_B if aside else None,
            aside_reference=before.aside if aside and self.loss.referenced else None,
        )
        loss, _ = self.loss.share(scores, self.loss.totals(self.rows))
        (weight_BA,) = torch.autograd.grad(loss, log_probs_BA)

        def add() -> None:  # by the chain rule, so that the logits of one answer are held at once
            for row, weights in zip(self.rows, weight_BA.tolist(), strict=True):
                for (_, ids), weight in zip(row.answers, weights, strict=True):
                    (_log_prob(self.model, row.prompt, ids) * weight).backward()

        return float(loss.detach()), gradient_of(self.model, add)


def _log_prob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the log-probability of ``answer`` after ``prompt``, summed over its tokens."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits_NV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    log_prob: torch.Tensor = logits_NV.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()
    return log_prob


def _error(found: Found, expected: Found) -> float:
    """Return the larger one of the relative errors of loss and gradient."""
    loss = abs(found[0] - expected[0]) / max(abs(expected[0]), LIMIT)
    return max(loss, distance(found[1], expected[1]), key=lambda error: float("inf") if error != error else error)
