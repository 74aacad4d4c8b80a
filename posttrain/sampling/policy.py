"""The policy of a stage as it answers questions while it is trained, and the rewards of its answers.

Several processes share the questions: each writes and scores its part, then all have all answers. An answer draws by
the seed, its question and its number, so that it is the same whoever writes it.
"""

# A = answers to the questions of a step, T = tokens of the longest answer, P = parts of a reward

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from posttrain.data.records import Question
from posttrain.engine import processes
from posttrain.engine.attention import causal_model
from posttrain.engine.precision import autocasting
from posttrain.model.probe import set_attention
from posttrain.rewards.reward import Scorer
from posttrain.sampling.answers import BLOCK, model_ends, stop_ids, text_of
from posttrain.sampling.sampler import Answer, Drawing, sample
from posttrain.stage import Progress

if TYPE_CHECKING:
    from posttrain.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question of the stage, before the policy answers it."""

    question: Question
    """The question as its source has it."""
    prompt: Sequence[int]
    """Token ids up to the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewarded:
    """An answer of the policy with its reward."""

    answer: Answer
    """The answer as token ids."""
    text: str
    """Its text without the stop token."""
    parts: Mapping[str, float]
    """Score by each reward."""
    reward: float
    """Their weighted sum."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model that is trained, with what it takes to ask it and to score what it says."""

    tokenizer: Any
    scorer: Scorer
    progress: Progress

    @torch.no_grad()
    def answer(self, engine: Engine, dtype: str, rows: Sequence[Asked], drawing: Drawing) -> list[list[Rewarded]]:
        """Return the answers to each of ``rows`` by the engine's model as it is, in the arithmetic of ``dtype``.

        Every process calls it with the same rows, and gets the answers to all of them. Raises as ``sample`` and
        ``Scorer.parts`` do.
        """
        share = -(-len(rows) // processes.world())
        first = min(processes.rank() * share, len(rows))
        own = rows[first : first + share]
        groups = self.write(engine, dtype, own, drawing)
        found = [self._rewarded(row, answer) for row, group in zip(own, groups, strict=True) for answer in group]
        if processes.world() > 1:
            found = self._gathered(found, first * drawing.k, len(rows) * drawing.k, drawing.max_tokens)
        return [found[start : start + drawing.k] for start in range(0, len(found), drawing.k)]

    @torch.no_grad()
    def write(self, engine: Engine, dtype: str, rows: Sequence[Asked], drawing: Drawing) -> list[list[Answer]]:
        """Return answers as ``answer`` does, with no reward, written by this process alone."""
        model = engine.model
        ends = stop_ids(self.tokenizer) | model_ends(model)
        size = max(1, BLOCK // drawing.k)
        found: list[list[Answer]] = []
        with _writing(causal_model(model)), autocasting(model, dtype):
            for start in range(0, len(rows), size):
                prompts = [each.prompt for each in rows[start : start + size]]
                found += engine.run(partial(sample, model, prompts, drawing, ends))
                self.progress.part(len(found) * drawing.k, len(rows) * drawing.k, "answer")
        return found

    def _rewarded(self, row: Asked, answer: Answer) -> Rewarded:
        text = text_of(self.tokenizer, answer)
        parts = self.scorer.parts(row.question, text, answer.ended)
        return Rewarded(answer=answer, text=text, parts=parts, reward=self.scorer.total(parts))

    def _gathered(self, own: Sequence[Rewarded], first: int, count: int, longest: int) -> list[Rewarded]:
        """Return the answers of all processes, ``count`` in all; those of this one begin at ``first``."""
        names = [reward.name for reward in self.scorer.rewards]
        ids_AT = torch.zeros(count, longest, dtype=torch.int64)
        log_probs_AT = torch.zeros(count, longest, dtype=torch.float64)
        parts_AP = torch.zeros(count, len(names), dtype=torch.float64)
        shape_A3 = torch.zeros(count, 3, dtype=torch.float64)
        for place, each in enumerate(own, start=first):
            size = len(each.answer.ids)
            ids_AT[place, :size] = torch.tensor(each.answer.ids)
            log_probs_AT[place, :size] = torch.tensor(each.answer.log_probs, dtype=torch.float64)
            parts_AP[place] = torch.tensor([each.parts[name] for name in names], dtype=torch.float64)
            shape_A3[place] = torch.tensor([size, each.answer.ended, each.answer.entropy], dtype=torch.float64)
        # every place is one process' alone, and zero in the others: their sum is exact
        ids, log_probs, parts, shape = [
            processes.total(each).tolist() for each in (ids_AT, log_probs_AT, parts_AP, shape_A3)
        ]
        return [
            self._rebuilt(ids[place][: int(size)], log_probs[place][: int(size)], bool(ended), entropy,
                          dict(zip(names, parts[place], strict=True)))
            for place, (size, ended, entropy) in enumerate(shape)
        ]  # fmt: skip

    def _rebuilt(
        self, ids: list[int], log_probs: list[float], ended: bool, entropy: float, parts: Mapping[str, float]
    ) -> Rewarded:
        answer = Answer(ids=tuple(ids), ended=ended, log_probs=tuple(log_probs), entropy=entropy)
        return Rewarded(
            answer=answer, text=text_of(self.tokenizer, answer), parts=parts, reward=self.scorer.total(parts)
        )


@contextlib.contextmanager
def _writing(causal: PreTrainedModel) -> Iterator[None]:
    """Give the model attention that writes with a cache, and its own back: kernels of packed rows have none."""
    before = causal.config._attn_implementation
    try:
        set_attention(causal, "sdpa")
    except (ImportError, ValueError):
        set_attention(causal, "eager")
    try:
        yield
    finally:
        set_attention(causal, before)
