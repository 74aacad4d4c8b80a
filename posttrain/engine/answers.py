"""Log-probabilities of answers to prompts: rows packed end to end, every answer isolated, nothing padded.

    row with a shared prompt     p0 p1 p2  a0 a1  b0          the prompt once, both answers after it
    row without                  p0 p1 p2  a0 a1 | p0 p1 p2  b0
    scored                              a0 a1  .              the last token of the prompt predicts the first
                                        b0 .                  token of each answer

Only the positions that predict an answer's token go through the output projection.
"""

# B = rows of a batch, A = answers of a row, T = tokens of the batch, N = tokens of all answers, D = width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.engine.ahead import on_device
from posttrain.engine.attention import causal_model, packed_hidden, shared_hidden
from posttrain.engine.attention_kernels import Family
from posttrain.engine.config import LoopConfig
from posttrain.engine.held_out import choose_held_out
from posttrain.engine.log_probs import token_log_probs
from posttrain.engine.loss import OutputHead
from posttrain.engine.neftune import noisy_embeddings
from posttrain.engine.precision import autocasting
from posttrain.model.device import exact

Answer = tuple[str, Sequence[int]]
"""Name of an answer in messages, and its token ids; the last is the end-of-turn token."""


class AnsweredRow(Protocol):
    """A prompt and its answers as token ids; all rows of a stage have equally many answers."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids up to the answer; at least one."""

    @property
    def answers(self) -> Sequence[Answer]:
        """Answers to the prompt: two of a pair, or one judged answer."""

    @property
    def aside(self) -> Sequence[int]:
        """Token ids of an answer to another prompt, scored without a gradient; empty where the loss needs none."""

    @property
    def where(self) -> str:
        """File and line of the record, for messages."""


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """The log-probabilities of a batch, in nats summed over the tokens of an answer, in float64."""

    rows: Sequence[Any]
    """Rows of the batch, [B]."""
    log_probs: torch.Tensor
    """Those of the policy, [B, A], with their graph."""
    tokens: torch.Tensor
    """Number of tokens of each answer, [B, A]."""
    reference: torch.Tensor | None = None
    """Those of the model before training, [B, A]; None for a loss without a reference."""
    aside: torch.Tensor | None = None
    """Those of the answers aside by the policy, [B], without a graph; None for rows that have none."""
    aside_reference: torch.Tensor | None = None
    """Those of the answers aside by the model before training, [B]."""

    def per_row(self, values: Sequence[Any]) -> torch.Tensor:
        """Return a value of each row beside the log-probabilities, [B]; no device is waited for."""
        return on_device(torch.tensor(values), self.log_probs.device)

    def part(self, places: slice) -> AnswerScores:
        """Return the rows at ``places`` alone."""
        tensors = ("log_probs", "tokens", "reference", "aside", "aside_reference")
        found: dict[str, Any] = {
            name: None if (each := getattr(self, name)) is None else each[places] for name in tensors
        }
        return AnswerScores(rows=self.rows[places], **found)


@dataclass(frozen=True)
class AnswerBatch:
    """Prompts and their answers laid end to end for one forward pass."""

    ids: torch.Tensor
    """Token ids [1, T]."""
    families: Sequence[Family]
    """Tokens of each prompt in the row, and of the answers after it."""
    scored: torch.Tensor
    """Positions in T, [N], that predict the tokens of the answers."""
    targets: torch.Tensor
    """The tokens of the answers, [N]."""
    owners: torch.Tensor
    """Number of the answer of each, [N]: those of the first row, then those of the next."""
    tokens: torch.Tensor
    """Number of tokens of each answer, [B, A]."""

    @classmethod
    def of(
        cls, rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device, shared: bool
    ) -> AnswerBatch:
        """Return the batch of ``rows``, each a prompt with its answers; ``shared`` holds a prompt once for all."""
        ids: list[int] = []
        families: list[Family] = []
        scored: list[int] = []
        targets: list[int] = []
        for prompt, answers in rows:
            for group in [answers] if shared else [[answer] for answer in answers]:
                last = len(ids) + len(prompt) - 1
                ids += prompt
                for answer in group:
                    scored += [last, *range(len(ids), len(ids) + len(answer) - 1)]
                    targets += answer
                    ids += answer
                families.append((len(prompt), [len(answer) for answer in group]))
        tokens_BA = torch.tensor([[len(answer) for answer in answers] for _, answers in rows])
        owners_N = torch.arange(tokens_BA.numel()).repeat_interleave(tokens_BA.flatten())
        return cls(
            ids=on_device(torch.tensor(ids)[None], device),
            families=families,
            scored=on_device(torch.tensor(scored), device),
            targets=on_device(torch.tensor(targets), device),
            owners=on_device(owners_N, device),
            tokens=on_device(tokens_BA, device),
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each family; their sum is T."""
        return [prompt + sum(answers) for prompt, answers in self.families]

    def log_probs(
        self, model: PreTrainedModel | PeftModel, config: LoopConfig, dtype: str, noise: float | None = None
    ) -> torch.Tensor:
        """Return the log-probability of each answer, [B, A] in float64; ``noise`` is NEFTune's alpha.

        They are where float64 is: on the CPU for a device without it.
        """
        # float64: a loss takes differences of these sums, small against them
        log_probs_N = self.token_log_probs(model, config, dtype, noise)
        summands_N = exact(log_probs_N)
        sums = torch.zeros(self.tokens.numel(), dtype=torch.float64, device=summands_N.device)
        return sums.index_add(0, self.owners.to(sums.device), summands_N).view_as(self.tokens)

    def token_log_probs(
        self,
        model: PreTrainedModel | PeftModel,
        config: LoopConfig,
        dtype: str,
        noise: float | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """Return the log-probability of each token of the answers, [N], at a temperature.

        Raises BadInput for a model that caps its logits, at a temperature other than 1.
        """
        causal = causal_model(model)
        # a family without shared tokens is a document: kernels that cannot share are asked for nothing else
        shared = any(len(answers) > 1 for _, answers in self.families)
        with noisy_embeddings(causal, self.lengths, noise), autocasting(model, dtype):
            if shared:
                hidden_TD = shared_hidden(causal, self.ids, self.families)
            else:
                hidden_TD = packed_hidden(causal, self.ids, self.lengths)
            hidden_ND = hidden_TD.index_select(0, self.scored)
            head = OutputHead.of(causal).at(temperature)
            return token_log_probs(head, hidden_ND, self.targets, config.loss_chunk)


def set_aside(
    rows: Sequence[Any], share: float, seed: int, clusters: Mapping[str, int] | None = None
) -> tuple[list[Any], list[Any]]:
    """Split ``rows`` into those to train and a seeded ``share`` for the eval loss; rows of one prompt stay together.

    So do those of a cluster: ``clusters`` are those of the context, by the rows' ``where``. Raises BadInput when
    nothing is left to train.
    """
    if share == 0:
        return list(rows), []
    prompts = sorted({tuple(row.prompt) for row in rows})
    known = clusters or {}
    alike = [(tuple(row.prompt), known[row.where]) for row in rows if row.where in known] if known else []
    chosen = choose_held_out(prompts, share, seed, "prompts", alike)
    trained = [row for row in rows if tuple(row.prompt) not in chosen]
    return trained, [row for row in rows if tuple(row.prompt) in chosen]
