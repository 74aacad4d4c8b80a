"""Special tokens that a base model lacks: appended to its tokenizer and its embeddings, and trained.

A new token starts as the mean of the tokens that the model knows, which makes it neither likely nor unlikely. Beside an
adapter its rows are trained by themselves (peft's token deltas), in the input embeddings and, where those are not tied
to the output projection, in both: low-rank updates of tied embeddings are merged wrongly, and a copy of the whole
embeddings would be hundreds of times larger. Full fine-tuning trains them with all the rest.
"""

# V = vocabulary, D = width

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import BadInput, Problem
from posttrain.model.base import ADAPTER_WEIGHTS

DELTA = "token_adapter.trainable_tokens_delta"
PREFIX = "base_model.model."
"""What peft puts before the name of a module of the model."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Append special tokens that ``tokenizer`` lacks; returns the ids of all of ``tokens``."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def add_embeddings(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give ``model`` rows for the tokens ``ids``, which follow those that it knows: each starts as their mean.

    Rows are appended unless the model has spare ones.
    """
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in embedding_layers(model).values():
            for parameter in layer.parameters():  # the weight [V, D], and a bias [V] of the output projection
                parameter[list(ids)] = parameter[: min(ids)].float().mean(0).to(parameter.dtype)


def embedding_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The input embeddings and, unless it is tied to them, the output projection of ``model``, by name."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: layer for layer in layers}


def token_rows(adapter: Path) -> dict[str, torch.Tensor]:
    """The trained rows of added tokens in the adapter of a folder, by the name that the file gives them."""
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    return {name: tensor for name, tensor in tensors.items() if name.endswith(DELTA)}


def fold_token_rows(model: PreTrainedModel, adapter: Path) -> LoraConfig:
    """Write the adapter's trained rows into the embeddings of ``model``; returns its configuration without them.

    Later stages train the rest of the adapter on: their trainers copy low-rank weights alone.
    """
    config = LoraConfig.from_pretrained(adapter)
    layers = embedding_layers(model)
    with torch.no_grad():
        for name, rows in token_rows(adapter).items():
            layer = name.removeprefix(PREFIX).removesuffix(f".{DELTA}")
            weight = layers[layer].get_parameter("weight")
            weight[config.trainable_token_indices[layer]] = rows.to(weight)
    config.trainable_token_indices = None
    return config


def reject_known(tokens: Sequence[str], stored: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise BadInput when the model's own tokenizer has one of ``tokens`` among its first ``embeddings`` ids."""
    vocabulary = stored.get_vocab()
    known = [token for token in tokens if vocabulary.get(token, embeddings) < embeddings]
    if known:
        raise BadInput(
            Problem(
                where="model.added_tokens",
                what=f"the model knows {', '.join(known)} already",
                fix="Leave out what the tokenizer has: nothing has to be added for it",
            )
        )
