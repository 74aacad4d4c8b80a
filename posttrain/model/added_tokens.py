"""Added special tokens: appended to a base's tokenizer and embeddings, and trained.

A new token starts as the mean of all known tokens: neither likely nor unlikely. Beside an adapter only its rows are
trained (peft's token deltas), in the input embeddings and, unless tied to these, in the output projection. Low-rank
updates of tied embeddings would be merged wrongly, and a copy of the whole embeddings would be hundreds of times
larger. Full fine-tuning trains the rows with all other weights.
"""

# V = vocabulary, D = width

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import BadInput, Problem
from posttrain.model.base import ADAPTER_WEIGHTS

DELTA = "token_adapter.trainable_tokens_delta"
UNWRITTEN = -1e4
"""Logit of a token that a model cannot write: far below any other, and finite."""
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

    Later stages train the low-rank part alone.
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


def fit_rows(model: PreTrainedModel, rows: int) -> None:
    """Give the embeddings of ``model`` as many rows as an adapter brings, in weights of their own.

    The new ones are the mean of the known: they matter only where the adapter does not bring its own.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied, known = head is not None and head.weight is embeddings.weight, embeddings.weight.shape[0]
    for layer in embedding_layers(model).values():  # transformers would write into weights shared with another model
        layer.weight = torch.nn.Parameter(layer.get_parameter("weight").detach().clone(), requires_grad=False)
    if tied:
        head.weight = embeddings.weight
    model.resize_token_embeddings(rows, mean_resizing=False)
    if rows > known:
        add_embeddings(model, range(known, rows))


def read_rows(model: PreTrainedModel, rows: int) -> None:
    """Let ``model`` read tokens up to ``rows`` as the mean of those it knows, and never write them.

    What it gives the known ones stays the same to the last bit.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight_VD = embeddings.get_parameter("weight").detach()
    missing = rows - weight_VD.shape[0]
    if missing > 0:
        mean_1D = weight_VD.float().mean(0, keepdim=True).to(weight_VD.dtype)
        embeddings.weight = torch.nn.Parameter(torch.cat([weight_VD, mean_1D.repeat(missing, 1)]), requires_grad=False)
        head.register_forward_hook(lambda _head, _hidden, logits_BTV: pad(logits_BTV, (0, missing), value=UNWRITTEN))


def brought_rows(adapter: Path, model: PreTrainedModel) -> tuple[int, set[int]] | None:
    """Return the rows of the embeddings that an adapter brings for ``model``, and the ids of those it holds.

    None when it brings none beyond the known rows, and leaves none out.
    """
    layers = {module: name for name, module in model.named_modules()}
    known = model.get_input_embeddings().weight.shape[0]
    names = [layers[layer] for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer]
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        kept = set(file.keys())
        whole = [f"{PREFIX}{name}{part}.weight" for name in names for part in ("", ".base_layer")]
        saved = {name: file.get_slice(name).get_shape()[0] for name in whole if name in kept}
    if saved:
        rows = max(saved.values())
        return (rows, set(range(rows))) if rows != known else None
    indices = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("trainable_token_indices")
    held = set(indices if isinstance(indices, list) else chain.from_iterable((indices or {}).values()))
    return (max(held) + 1, held | set(range(known))) if held and max(held) >= known else None


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
