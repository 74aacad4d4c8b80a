"""Added special tokens: appended to a base's tokenizer and embeddings, and trained.

A new token starts as the mean of all known tokens: neither likely nor unlikely. Beside an adapter only its rows are
trained (peft's token deltas), in the input embeddings and, unless tied to these, in the output projection. Low-rank
updates of tied embeddings would be merged wrongly, and a copy of the whole embeddings would be hundreds of times
larger. Full fine-tuning trains the rows with all other weights.
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
"""peft's prefix of a module's name."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Append special tokens missing from ``tokenizer``; return the ids of all ``tokens``."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def add_embeddings(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Set the rows of the tokens ``ids``, which follow the known ones, to the mean of the known rows.

    Rows are appended unless the model has spare ones: many pad their embeddings to a round number.
    """
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        # The rows are set below; transformers' own mean_resizing would draw them at random.
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for layer in embedding_layers(model).values():
            for parameter in layer.parameters():  # the weight [V, D], and a bias [V] of the output projection
                parameter[list(ids)] = parameter[: min(ids)].float().mean(0).to(parameter.dtype)


def embedding_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the input embeddings and, unless tied to them, the output projection of ``model``, by name."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: layer for layer in layers}


def token_rows(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the trained rows of added tokens in an adapter's folder, by their names in the file."""
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    return {name: tensor for name, tensor in tensors.items() if name.endswith(DELTA)}


def fold_token_rows(model: PreTrainedModel, adapter: Path) -> LoraConfig:
    """Write the adapter's trained rows into the embeddings of ``model``; return its configuration without them.

    Later stages train the low-rank part alone: their trainers copy low-rank weights and would leave the rows out.
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
                what=f"the model already knows {', '.join(known)}",
                fix="Leave out tokens that the tokenizer has",
            )
        )
