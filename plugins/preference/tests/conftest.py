"""A tiny SFT model on disk, preference records for it, and the context in which a stage would see both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from posttrain_preference.config import DPOSettings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain import Preference, StageContext
from posttrain.artifact import ModelSource

Pair = tuple[Sequence[str], str, str]

SPECIAL = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
WORDS = [
    *("what", "is", "the", "river", "flag", "animal", "food", "craft", "of", "a", "town"),
    *("red", "blue", "green", "otter", "heron", "bread", "cheese", "lace", "clay", "yes", "no"),
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As many real templates do, it ends a turn with a newline after the stop token."""


class RecordedProgress:
    """Keeps what a stage reports."""

    def __init__(self) -> None:
        self.started: tuple[int, int] | None = None
        self.steps: dict[int, Mapping[str, float]] = {}
        self.notes: list[str] = []

    def start(self, total_steps: int, done_steps: int = 0) -> None:
        self.started = (total_steps, done_steps)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = dict(metrics)

    def note(self, text: str) -> None:
        self.notes.append(text)


def write_tokenizer(folder: Path) -> int:
    """One token per word; returns the size of the vocabulary."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "\n", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def write_parent(folder: Path, adapter: bool) -> ModelSource:
    """A random Llama with random weights, or with a random adapter on it, in place of an SFT model."""
    torch.manual_seed(0)
    size = write_tokenizer(folder / "base")
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    if adapter:
        lora = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
        peft = get_peft_model(model, lora)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        peft.save_pretrained(folder / "sft")
    return ModelSource(
        name="sft",
        model=folder / "base",
        adapter=folder / "sft" if adapter else None,
        tokenizer=folder / "base",
        chat_template=TEMPLATE,
        digest="0" * 64,
        base="some/base",
        model_digest="1" * 64,
    )


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """The same kind of parent as an adapter and as full weights."""
    return {
        "lora": write_parent(tmp_path_factory.mktemp("lora"), adapter=True),
        "full": write_parent(tmp_path_factory.mktemp("full"), adapter=False),
    }


def preference(prompt: Sequence[str], chosen: str, rejected: str, where: str) -> Preference:
    """A preference about the answer to ``prompt``: contents of user and assistant in turn."""
    turns = tuple({"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(prompt))
    answers = [({"role": "assistant", "content": content},) for content in (chosen, rejected)]
    return Preference(prompt=turns, chosen=answers[0], rejected=answers[1], where=where)


def pairs(count: int) -> list[Pair]:
    """Pairs of different lengths in which the better answer begins with ``the``, not with ``a``."""
    return [
        (
            [f"what is the {WORDS[3 + i % 5]} of {' '.join(WORDS[: 1 + i % 4])} town"],
            f"the {WORDS[11 + i % 3]} {WORDS[14 + i % 6]}",
            f"a {WORDS[14 + (i + 1) % 6]}",
        )
        for i in range(count)
    ]


@pytest.fixture
def make_context(tmp_path: Path, parents: dict[str, ModelSource]) -> Callable[..., StageContext]:
    """Makes a context; ``records`` are a number of invented pairs, or pairs as (prompt, chosen, rejected)."""

    def make(
        kind: str = "lora",
        folder: str = "run",
        records: int | list[Pair] = 12,
        dtype: str = "float32",
        seed: int = 3,
        stop_requested: Callable[[], bool] = lambda: False,
        **settings: Any,
    ) -> StageContext:
        checkpoints, output = tmp_path / folder / "checkpoints", tmp_path / folder / "output"
        for path in (checkpoints, output):
            path.mkdir(parents=True, exist_ok=True)
        told = pairs(records) if isinstance(records, int) else records
        small = {"lr": 2e-3, "per_device_batch_size": 2, "gradient_accumulation": 2, "epochs": 2, "warmup_ratio": 0.0}
        return StageContext(
            name="dpo",
            config=DPOSettings(**(small | settings)),
            parent=parents[kind],
            records=[preference(*pair, f"pairs.jsonl:{line}") for line, pair in enumerate(told, start=1)],
            seed=seed,
            dtype=dtype,
            progress=RecordedProgress(),
            stop_requested=stop_requested,
            checkpoints=checkpoints,
            output=output,
        )

    return make
