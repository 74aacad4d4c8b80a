"""The policy of a stage as it answers questions while it is trained, and the rewards of its answers.

Several processes share the questions: each writes and scores its part, then all have all answers. An answer draws by
the seed, its question and its number, so that it is the same whoever writes it.
"""

# A = answers to the questions of a step, T = tokens of the longest answer, P = parts of a reward, B = bytes of a note

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from posttrain.config.on_policy import BLOCK
from posttrain.data.records import Question
from posttrain.engine import processes
from posttrain.engine.attention import causal_model
from posttrain.engine.precision import autocasting
from posttrain.errors import reject
from posttrain.model.probe import set_attention
from posttrain.rewards.reward import NOTE_BYTES, Attempt
from posttrain.rewards.scorer import Rated, Scorer, count_notes
from posttrain.sampling.answers import model_ends, stop_ids, text_of
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

    @property
    def where(self) -> str:
        """Place of the question."""
        return self.question.where


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewarded:
    """An answer of the policy with its reward."""

    answer: Answer
    """The answer as token ids."""
    text: str
    """Its text without the stop token."""
    parts: Mapping[str, float]
    """Score by each reward that could score it."""
    notes: Mapping[str, str]
    """Note of each reward that left one."""
    reward: float
    """Weighted sum of its scores; of one that could not be scored the mean of its question's others, so that nothing
    pushes it."""


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
        ``Scorer.rate`` do, and BadInput when no answer could be scored.
        """
        share = -(-len(rows) // processes.world())
        first = min(processes.rank() * share, len(rows))
        own = rows[first : first + share]
        groups = self.write(engine, dtype, own, drawing)
        answers = [answer for group in groups for answer in group]
        found = [*zip(answers, self._rate(own, groups), strict=True)]
        if processes.world() > 1:
            found = self._gathered(found, first * drawing.k, len(rows) * drawing.k, drawing.max_tokens)
        return self._rewarded([found[start : start + drawing.k] for start in range(0, len(found), drawing.k)])

    @torch.no_grad()
    def write(self, engine: Engine, dtype: str, rows: Sequence[Asked], drawing: Drawing) -> list[list[Answer]]:
        """Return answers as ``answer`` does, with no reward, written by this process alone.

        Every process calls it at the same time, each with rows of its own, or none.
        """
        model = engine.model
        ends = stop_ids(self.tokenizer) | model_ends(model)
        size = max(1, BLOCK // drawing.k)
        found: list[list[Answer]] = []
        # whole weights: answers end at different lengths, so that processes ask the model differently often
        with engine.whole(), writing(causal_model(model)), autocasting(model, dtype):
            for start in range(0, len(rows), size):
                prompts = [each.prompt for each in rows[start : start + size]]
                found += sample(model, prompts, drawing, ends)
                self.progress.part(len(found) * drawing.k, len(rows) * drawing.k, "answer")
        return found

    def _rate(self, rows: Sequence[Asked], groups: Sequence[Sequence[Answer]]) -> list[Rated]:
        attempts = [
            Attempt(question=row.question, text=text_of(self.tokenizer, answer), ended=answer.ended)
            for row, group in zip(rows, groups, strict=True)
            for answer in group
        ]
        return self.scorer.rate(attempts)

    def _rewarded(self, groups: Sequence[Sequence[tuple[Answer, Rated]]]) -> list[list[Rewarded]]:
        """Return the answers with their rewards. Raises BadInput when there are answers and none could be scored."""
        known = [rated.reward for group in groups for _, rated in group if rated.reward is not None]
        if groups and not known:
            counts = count_notes(rated.notes for group in groups for _, rated in group)
            told = "; ".join(f"{count:,} {note}" for note, count in counts.items())
            fix = "Mend what the reward needs; the same command resumes from the last checkpoint"
            reject("reward", f"no answer of this step could be scored: {told}", fix)
        found = []
        for group in groups:
            mean = fmean([rated.reward for _, rated in group if rated.reward is not None] or known)
            found.append(
                [
                    Rewarded(
                        answer=answer, text=text_of(self.tokenizer, answer), parts=rated.parts, notes=rated.notes,
                        reward=mean if rated.reward is None else rated.reward,
                    )
                    for answer, rated in group
                ]
            )  # fmt: skip
        return found

    def _gathered(
        self, own: Sequence[tuple[Answer, Rated]], first: int, count: int, longest: int
    ) -> list[tuple[Answer, Rated]]:
        """Return the answers of all processes, ``count`` in all; those of this one begin at ``first``."""
        names = [reward.name for reward in self.scorer.rewards]
        ids_AT = torch.zeros(count, longest, dtype=torch.int64)
        log_probs_AT = torch.zeros(count, longest, dtype=torch.float64)
        parts_AP = torch.zeros(count, len(names), dtype=torch.float64)
        notes_APB = torch.zeros(count, len(names), NOTE_BYTES, dtype=torch.int64)
        shape_A3 = torch.zeros(count, 3, dtype=torch.float64)
        for place, (answer, rated) in enumerate(own, start=first):
            size = len(answer.ids)
            ids_AT[place, :size] = torch.tensor(answer.ids)
            log_probs_AT[place, :size] = torch.tensor(answer.log_probs, dtype=torch.float64)
            parts_AP[place] = torch.tensor([rated.parts.get(name, nan) for name in names], dtype=torch.float64)
            for number, name in enumerate(names):
                note = rated.notes.get(name, "").encode()[:NOTE_BYTES]
                notes_APB[place, number, : len(note)] = torch.tensor(list(note))
            shape_A3[place] = torch.tensor([size, answer.ended, answer.entropy], dtype=torch.float64)
        # every place is one process' alone, and zero in the others: their sum is exact
        ids, log_probs, parts, notes, shape = [
            processes.total(each).tolist() for each in (ids_AT, log_probs_AT, parts_AP, notes_APB, shape_A3)
        ]
        answers = [
            Answer(
                ids=tuple(ids[place][: int(size)]), ended=bool(ended), log_probs=tuple(log_probs[place][: int(size)]),
                entropy=entropy,
            )
            for place, (size, ended, entropy) in enumerate(shape)
        ]  # fmt: skip
        return [*zip(answers, map(self._rebuilt, parts, notes), strict=True)]

    def _rebuilt(self, parts_P: Sequence[float], notes_PB: Sequence[Sequence[int]]) -> Rated:
        """Return scores that a process has sent: not a number stands for none."""
        names = [reward.name for reward in self.scorer.rewards]
        parts = {name: value for name, value in zip(names, parts_P, strict=True) if not isnan(value)}
        texts = [bytes(each).rstrip(b"\0").decode(errors="ignore") for each in notes_PB]
        notes = {name: text for name, text in zip(names, texts, strict=True) if text}
        return Rated(parts=parts, notes=notes, reward=self.scorer.total(parts))


@contextlib.contextmanager
def writing(causal: PreTrainedModel) -> Iterator[None]:
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
