"""A tiny SFT model on disk, preference records for it, and the context in which a stage would see both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from posttrain_preference.methods import METHODS

from posttrain import Feedback, Preference, StageContext
from posttrain.artifact import ModelSource
from posttrain.testing import Recorder

Pair = tuple[Sequence[str], str, str]
MakeContext = Callable[..., StageContext]

STAGES = list(METHODS)
"""The stages of this plugin."""

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


def write_tokenizer(folder: Path) -> int:
    """One token per word; returns the size of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "\n", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": True},
    "experts": {},
    "plain": {},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "qlora": {},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": {"model.embed_tokens": [3, 4], "lm_head": [3, 4]}},
    "tied_tokens": {"trainable_token_indices": {"model.embed_tokens": [3, 4]}},
}
"""Settings of every kind of adapter that an SFT artifact may hold."""


def write_parent(folder: Path, kind: str) -> ModelSource:
    """A random Llama with random weights, or with a random adapter on it, in place of an SFT model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    size = write_tokenizer(folder / "base")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    config = AutoConfig.for_model(
        "qwen3_moe" if kind == "experts" else "llama",
        **(experts if kind == "experts" else {}),
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
        tie_word_embeddings=kind.startswith("tied"),
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    if kind != "full":
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **ADAPTERS[kind]}
        peft = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        peft.save_pretrained(folder / "sft", save_embedding_layers=False)
    return parent_source(folder)


def parent_source(folder: Path) -> ModelSource:
    """The parent that was written to ``folder``."""
    return ModelSource(
        name="sft",
        model=folder / "base",
        adapter=folder / "sft" if (folder / "sft").exists() else None,
        tokenizer=folder / "base",
        chat_template=TEMPLATE,
        digest="0" * 64,
        base="some/base",
        model_digest="1" * 64,
        quantization="nf4" if folder.name.startswith("qlora") else None,
    )


def preference(prompt: Sequence[str], chosen: str, rejected: str, where: str) -> Preference:
    """A preference about the answer to ``prompt``: contents of user and assistant in turn."""
    turns = tuple({"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(prompt))
    answers = [({"role": "assistant", "content": content},) for content in (chosen, rejected)]
    return Preference(prompt=turns, chosen=answers[0], rejected=answers[1], where=where)


def feedback(prompt: str, answer: str, label: bool) -> Feedback:
    """One judged answer."""
    said = ({"role": "user", "content": prompt},), ({"role": "assistant", "content": answer},)
    return Feedback(prompt=said[0], completion=said[1], label=label, where="feedback.jsonl:1")


def _record(told: Any, where: str) -> Any:
    return preference(*told, where) if isinstance(told, tuple) else told


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


def build_context(
    folder: Path,
    parent: ModelSource,
    stage: str = "dpo",
    records: int | list[Any] = 12,
    dtype: str = "float32",
    seed: int = 3,
    stop_requested: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> StageContext:
    """A context below ``folder``; ``records`` are a number of invented pairs, pairs of texts, or records."""
    checkpoints, output = folder / "checkpoints", folder / "output"
    for path in (checkpoints, output):
        path.mkdir(parents=True, exist_ok=True)
    given = pairs(records) if isinstance(records, int) else records
    small = {"lr": 2e-3, "per_device_batch_size": 2, "gradient_accumulation": 2, "epochs": 2, "warmup_ratio": 0.0}
    return StageContext(
        name=stage,
        config=METHODS[stage].settings(kind=stage, **(small | settings)),
        parent=parent,
        records=[_record(told, f"pairs.jsonl:{line}") for line, told in enumerate(given, start=1)],
        seed=seed,
        dtype=dtype,
        progress=Recorder(),
        stop_requested=stop_requested,
        checkpoints=checkpoints,
        output=output,
    )


def progress(context: StageContext) -> Recorder:
    """What the stage reported."""
    return cast("Recorder", context.progress)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of the one safetensors file in ``folder``."""
    from safetensors.torch import load_file

    return dict(load_file(next(path for path in folder.glob("*.safetensors") if path.name != "probe.safetensors")))
