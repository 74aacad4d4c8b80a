"""The quickstart's base: a byte-level BPE and a Llama of two million parameters, trained on documents from nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# S = steps, R = rows, T = tokens, V = vocabulary, D = width

SEED = 20
STEPS = 200
ROWS = 32
ROW_TOKENS = 128
PEAK_LR = 6e-3
VOCABULARY = 1536

END_OF_DOCUMENT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_DOCUMENT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_DOCUMENT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pack_rows(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All rows of the run: the documents, shuffled anew in each epoch, each behind an end-of-document token."""
    import torch

    rng = random.Random(f"{SEED} epochs")
    end = tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT)
    encoded = [[*ids, end] for ids in tokenizer(list(documents))["input_ids"]]
    stream: list[int] = []
    while len(stream) < STEPS * ROWS * ROW_TOKENS:
        rng.shuffle(encoded)
        stream.extend(itertools.chain.from_iterable(encoded))
    return torch.tensor(stream[: STEPS * ROWS * ROW_TOKENS]).view(STEPS, ROWS, ROW_TOKENS)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama: 4 layers, width 192, tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    end = [tokenizer.convert_tokens_to_ids(token) for token in (END_OF_DOCUMENT, TURN_END)]
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end[0],
        )
    )


def train(model: LlamaForCausalLM, rows_SRT: torch.Tensor, end: int, unread: Sequence[int]) -> None:
    """Train on one batch of rows per step, in float32.

    ``unread`` names tokens that no document holds. Their embeddings keep their random start: a softmax pushes all
    tokens that never occur in the same direction, and then no chat could tell the start of a turn from its end.
    """
    import torch

    optimizers = new_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate) for optimizer in optimizers]
    embeddings_VD = model.get_input_embeddings().weight
    for step, rows_RT in enumerate(rows_SRT, 1):
        positions_RT, labels_RT = isolate(rows_RT, end)
        loss = model(input_ids=rows_RT, position_ids=positions_RT, labels=labels_RT, use_cache=False).loss
        loss.backward()
        embeddings_VD.grad[list(unread)] = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        model.zero_grad()
        if step % 50 == 0:
            print(f"step {step}/{len(rows_SRT)}  loss {loss.item():.3f}", flush=True)


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns facts several times faster; AdamW for the rest."""
    import torch

    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def isolate(rows_RT: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that start anew after each ``end``, and labels without the first token of each document.

    Without an attention mask and a cache, transformers lets a token see its own document only when positions restart.
    """
    import torch

    index_T = torch.arange(rows_RT.shape[1])
    first_RT = torch.zeros_like(rows_RT, dtype=torch.bool)
    first_RT[:, 0] = True
    first_RT[:, 1:] = rows_RT[:, :-1] == end
    start_RT = torch.where(first_RT, index_T, 0).cummax(dim=1).values
    return index_T - start_RT, rows_RT.masked_fill(first_RT, -100)


def learning_rate(step: int) -> float:
    """Share of the peak: a short warm-up, then a cosine to a twentieth."""
    warmup = STEPS // 20
    return (step + 1) / warmup if step < warmup else 0.05 + 0.475 * (1 + math.cos(math.pi * step / STEPS))


def pretrain(documents: Sequence[str], folder: Path) -> None:
    """Train tokenizer and model on ``documents`` and write them with a manifest of their hashes."""
    import torch

    tokenizer = train_tokenizer(documents)
    model = new_model(tokenizer)
    rows_SRT = pack_rows(documents, tokenizer)
    unread = sorted(set(range(len(tokenizer))) - set(rows_SRT.flatten().tolist()))
    train(model, rows_SRT, tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT), unread)
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Record the hash of every file in ``folder`` and what made it."""
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    manifest = {
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "seed": SEED,
        "steps": STEPS,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "torch", "transformers")},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
