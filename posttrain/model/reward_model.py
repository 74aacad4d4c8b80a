"""Answers scored by a reward model: a sequence classifier with one output, by its own chat template."""

# R = conversations of a batch, T = tokens

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.artifact import ModelSource
from posttrain.config.ranges import number
from posttrain.config.schema import ModelConfig
from posttrain.errors import BadInput, reject
from posttrain.host import activity
from posttrain.rewards.reward import Attempt, Reward, Score, Scores

if TYPE_CHECKING:
    from posttrain.tokens.chat import ChatRenderer

NAME = "reward_model"
UNHELD = "the chat template of the reward model cannot hold it"
TOO_LONG = "it is too long for the reward model"


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings:
    """Settings of a reward model."""

    path: str
    """Folder of the model, or its name on the hub."""
    revision: str | None = None
    """Commit of the hub's repository."""
    batch_size: int = number(8, least=1)
    """Conversations at once."""


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A loaded reward model."""

    model: Any
    renderer: ChatRenderer
    batch_size: int

    def scores(self, attempts: Sequence[Attempt]) -> list[float | Score]:
        """Return the model's output for the conversation of each answer."""
        rendered = [self._ids(each) for each in attempts]
        found: dict[int, float | Score] = {
            row: Score(value=None, note=each) for row, each in enumerate(rendered) if isinstance(each, str)
        }
        rows = sorted(set(range(len(attempts))) - set(found), key=lambda row: len(rendered[row]))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            activity.sign_of_life()
            values = self._outputs([ids for row in batch if not isinstance(ids := rendered[row], str)])
            found |= dict(zip(batch, values, strict=True))
        return [found[row] for row in range(len(attempts))]

    def _ids(self, attempt: Attempt) -> list[int] | str:
        """Return the token ids of a conversation, or why there are none."""
        from posttrain.data.records import Conversation

        turns = (*attempt.question.prompt, {"role": "assistant", "content": attempt.text})
        try:
            shown = self.renderer.conversation(Conversation(messages=turns, where=attempt.question.where))
        except BadInput:
            return UNHELD
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return list(shown.ids) if room is None or len(shown.ids) <= room else TOO_LONG

    def _outputs(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the outputs of conversations, padded at their end with a token that none of them holds.

        The classifiers of transformers take the last token that is no padding for the end.
        """
        import torch

        held = {token for row in rows for token in row}
        padding = next(token for token in range(len(held) + 1) if token not in held)
        self.model.config.get_text_config().pad_token_id = self.model.config.pad_token_id = padding
        width = max(map(len, rows))
        ids_RT = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], device=self.model.device)
        mask_RT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        with torch.no_grad():
            outputs_R = self.model(input_ids=ids_RT, attention_mask=mask_RT).logits[:, 0]
        found: list[float] = outputs_R.float().tolist()
        return found


def reward_model() -> Reward:
    """Return the reward."""
    return Reward(
        name=NAME,
        summary="the output of a reward model: a sequence classifier with one output",
        version=1,
        settings=RewardModelSettings,
        prepare=lambda settings: f"digest {_source(settings).digest}",
        open=_open,
    )


def _source(settings: RewardModelSettings) -> ModelSource:
    """Return the model's files. Raises BadInput for a model that is missing, damaged, or no reward model."""
    from posttrain.model.base import resolve_base

    try:
        source = resolve_base(ModelConfig(path=settings.path, revision=settings.revision))
    except BadInput as error:  # its setting is not the recipe's model
        problems = [replace(each, where=each.where.replace("model.", f"{NAME}.", 1)) for each in error.problems]
        raise BadInput(problems) from None
    config = json.loads((source.model / "config.json").read_text(encoding="utf-8"))
    outputs = config.get("num_labels") or len(config.get("id2label") or (0, 0))
    kinds = config.get("architectures") or ["no architecture"]
    if outputs != 1 or not str(kinds[0]).endswith("ForSequenceClassification"):
        what = f"{kinds[0]} with {outputs} outputs is no reward model"
        reject(f"reward_model.path: {settings.path}", what, "Give a ...ForSequenceClassification with num_labels 1")
    return source


def _open(settings: RewardModelSettings, kept: Path) -> Scores:
    import torch
    from transformers import AutoModelForSequenceClassification

    from posttrain.model.device import CUDA, default_device
    from posttrain.model.loading import load_tokenizer
    from posttrain.model.trust import foreign
    from posttrain.tokens.chat import ChatRenderer

    source = _source(settings)
    device = default_device()
    dtype = torch.bfloat16 if device.type == CUDA else torch.float32
    with foreign(source.model, "the reward model cannot be loaded"), torch.random.fork_rng():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.model, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        reject(f"reward_model.path: {settings.path}", f"its weights lack {', '.join(missing[:3])}", "Copy it again")
    renderer = ChatRenderer(load_tokenizer(source))
    ready = model.eval().requires_grad_(False).to(device)
    return RewardModel(model=ready, renderer=renderer, batch_size=settings.batch_size).scores
