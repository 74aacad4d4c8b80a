"""Sampling of answers with a cache of keys and values: a block of prompts at once, several answers to each.

An answer draws its random numbers by the seed of its own question and number. A block is asked by itself, with nothing
in its batches from another: whoever asks it, in whatever order, gets the same answers.
"""

# B = prompts of the block, R = answers still being written, T = tokens, V = vocabulary

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.digests import digest_of
from posttrain.engine.attention import causal_model
from posttrain.errors import FOREIGN, ArtifactDamaged, brief, reject
from posttrain.model.device import exact_device


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The settings of sampled answers."""

    k: int
    """Answers to each prompt."""
    temperature: float
    """0 takes the likeliest token, at temperature 1."""
    max_tokens: int
    """Longest answer, its stop token included."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A sampled answer as token ids."""

    ids: tuple[int, ...]
    """Its tokens; of one that ended, the last is its stop token."""
    ended: bool
    """False when it was cut at the longest length."""
    log_probs: tuple[float, ...]
    """Log-probability of each token at the temperature of sampling, in nats."""
    entropy: float
    """Mean entropy of the distributions that its tokens were drawn from, in nats."""


@torch.no_grad()
def sample(
    model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], drawing: Drawing, ends: Iterable[int]
) -> list[list[Answer]]:
    """Return ``drawing.k`` answers to each of ``prompts``, which are asked as one block; ``ends`` stop an answer.

    The model is asked in evaluation mode and left in its own. Raises ArtifactDamaged when a logit is not finite,
    BadInput when the model cannot write, or a prompt leaves no room for an answer.
    """
    _require_room(model, prompts, drawing)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return _Block(model, prompts, drawing, frozenset(ends)).write()
    except FOREIGN as error:
        what = f"{type(causal_model(model)).__name__} cannot write answers: {brief(error)}"
        reject("model.path", what, "Sample from a model that transformers can generate with")
    finally:
        for module in training:
            module.training = True


def answer_seed(seed: int, prompt: Sequence[int], number: int) -> int:
    """Return the seed of answer ``number`` to a prompt: of nothing else, so that no neighbour changes it."""
    return int(digest_of([seed, list(prompt), number])[:15], 16)


def _require_room(model: Any, prompts: Sequence[Sequence[int]], drawing: Drawing) -> None:
    room = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if room is not None and longest + drawing.max_tokens > room:
        what = f"a prompt of {longest:,} tokens and an answer of {drawing.max_tokens:,} exceed the context of {room:,}"
        reject("max_tokens", what, "Lower max_tokens, or leave out the longest questions")


class _Block:
    """Answers to a block of prompts, token by token."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], drawing: Drawing, ends: frozenset[int]) -> None:
        self._model, self._prompts, self._drawing = model, prompts, drawing
        device = causal_model(model).device
        self._device = device
        self._ends = torch.tensor(sorted(ends), device=device)
        rows = len(prompts) * drawing.k
        self._noise_RT = torch.stack(
            [
                torch.rand(
                    drawing.max_tokens,
                    generator=torch.Generator().manual_seed(answer_seed(drawing.seed, prompt, number)),
                    dtype=torch.float64,
                )
                for prompt in prompts
                for number in range(drawing.k)
            ]
        ).to(exact_device(device))
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._log_probs: list[list[float]] = [[] for _ in range(rows)]
        self._entropies: list[list[float]] = [[] for _ in range(rows)]
        self._ended = [False] * rows

    def write(self) -> list[list[Answer]]:
        """Write every answer to its end."""
        k = self._drawing.k
        width = max(map(len, self._prompts))
        ids_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in self._prompts], device=self._device)
        mask_BT = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in self._prompts], device=self._device
        )
        cache, logits_BV = self._forward(ids_BT, mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0), None)
        cache.batch_repeat_interleave(k)
        logits_RV, mask_RT = logits_BV.repeat_interleave(k, 0), mask_BT.repeat_interleave(k, 0)
        alive = torch.arange(len(self._ids), device=self._device)
        for step in range(self._drawing.max_tokens):
            chosen_R = self._draw(logits_RV, alive, step)
            going_R = ~torch.isin(chosen_R, self._ends)
            for row, going in zip(alive.tolist(), going_R.tolist(), strict=True):
                self._ended[row] = not going
            if step + 1 == self._drawing.max_tokens or not going_R.any():
                break
            if not going_R.all():
                kept = going_R.nonzero()[:, 0]
                alive, chosen_R, mask_RT = alive[kept], chosen_R[kept], mask_RT[kept]
                cache.batch_select_indices(kept)
            mask_RT = torch.cat([mask_RT, mask_RT.new_ones(len(mask_RT), 1)], 1)
            positions_R1 = mask_RT.sum(1, keepdim=True) - 1
            cache, logits_RV = self._forward(chosen_R[:, None], mask_RT, positions_R1, cache)
        answers = [self._answer(row) for row in range(len(self._ids))]
        return [answers[start : start + k] for start in range(0, len(answers), k)]

    def _forward(
        self, ids_RT: torch.Tensor, mask_RT: torch.Tensor, positions_RT: torch.Tensor, cache: Any
    ) -> tuple[Any, torch.Tensor]:
        """Return the cache and the logits [R, V] after the last tokens."""
        options = {"logits_to_keep": 1} if self._keeps_last else {}
        found = self._model(
            input_ids=ids_RT, attention_mask=mask_RT, position_ids=positions_RT, past_key_values=cache, use_cache=True,
            **options,
        )  # fmt: skip
        return found.past_key_values, found.logits[:, -1].float()

    @property
    def _keeps_last(self) -> bool:
        return "logits_to_keep" in inspect.signature(causal_model(self._model).forward).parameters

    def _draw(self, logits_RV: torch.Tensor, alive: torch.Tensor, step: int) -> torch.Tensor:
        """Draw a token [R] for each answer by its own number, and note its log-probability and the entropy."""
        greedy = self._drawing.temperature == 0
        log_probs_RV = (logits_RV if greedy else logits_RV / self._drawing.temperature).log_softmax(-1)
        if not torch.isfinite(log_probs_RV.amax(-1)).all():
            raise ArtifactDamaged("the model that was to answer gives logits that are not finite")
        summed_RV = log_probs_RV.to(self._noise_RT.device)
        probs_RV = summed_RV.double().exp()
        if greedy:
            chosen_R = logits_RV.argmax(-1)
        else:
            ladder_RV = probs_RV.cumsum(-1)
            height_R1 = self._noise_RT[alive.to(probs_RV.device), step][:, None] * ladder_RV[:, -1:]
            chosen_R = torch.searchsorted(ladder_RV, height_R1, right=True)[:, 0].clamp(max=logits_RV.shape[-1] - 1)
            chosen_R = chosen_R.to(self._device)
        log_probs_R = log_probs_RV.gather(1, chosen_R[:, None])[:, 0]
        entropy_R = -(probs_RV * summed_RV.clamp(min=-1e4)).sum(-1)
        found = zip(alive.tolist(), chosen_R.tolist(), log_probs_R.tolist(), entropy_R.tolist(), strict=True)
        for row, token, log_prob, entropy in found:
            self._ids[row].append(token)
            self._log_probs[row].append(log_prob)
            self._entropies[row].append(entropy)
        return chosen_R

    def _answer(self, row: int) -> Answer:
        entropies = self._entropies[row]
        return Answer(
            ids=tuple(self._ids[row]),
            ended=self._ended[row],
            log_probs=tuple(self._log_probs[row]),
            entropy=sum(entropies) / len(entropies),
        )
