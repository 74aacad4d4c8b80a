"""Saving of a trained model: equal weights give equal bytes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from posttrain.artifact import ModelSource
from posttrain.chat_template import TEMPLATE, TOKENIZER_CONFIG
from posttrain.errors import ArtifactDamaged
from posttrain.model.added_tokens import add_tokens, token_rows
from posttrain.model.base import ADAPTER_WEIGHTS, TOKENIZER_FILES
from posttrain.model.loading import ADAPTER, DTYPES, load_stored_tokenizer, load_tokenizer
from posttrain.model.quantisation import save_quantisation
from posttrain.model.trust import read_json
from posttrain.tokens.chat import answer_ends

GENERATION_CONFIG = "generation_config.json"
SHARD_SIZE = "5GB"


def save_model(model: PreTrainedModel | PeftModel, parent: ModelSource, output: Path, dtype: str) -> None:
    """Write the adapter ``default`` (in float32) or the full weights (in ``dtype``), ready to be served.

    Beside them stand the parent's tokenizer, its template, and its generation settings with the template's stop tokens.
    The base under an adapter is recorded as ``parent.base``. Full weights are rounded to ``dtype`` in place, to keep
    the model in memory equal to the one on disk.

    Of several processes each calls it, as sliced weights are gathered from all; process 0 writes.
    """
    if isinstance(model, PeftModel):
        _save_adapter(model, parent, output)
    elif is_sliced(model):
        _save_slices(model, output, dtype)
    elif writes():
        _save_weights(model, output, dtype)
    if writes():
        _save_generation(model, parent, output)
        _copy_tokenizer(parent, output)


def writes() -> bool:
    """Return True on the process that writes: the only one, or process 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_sliced(model: torch.nn.Module) -> bool:
    """Return True when this process holds slices of the weights of ``model``."""
    return any(isinstance(parameter.data, DTensor) for parameter in model.parameters())


def _whole(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor gathered from all processes, on the CPU; raise ArtifactDamaged for the place of one elsewhere."""
    if not tensor.numel():
        raise ArtifactDamaged(f"weight {name} is empty: its numbers are in other processes, and nobody gathered them")
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn safetensors' own error for a full disk or a failed write into the OSError behind it."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def _save_adapter(model: PeftModel, parent: ModelSource, output: Path) -> None:
    # peft's save_pretrained would add a model card and other adapters, ask the hub about the base, and write sets in
    # the order of their hashes, which differs between processes.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {name: _whole(name, tensor).float().contiguous() for name, tensor in state.items()}
    if not writes():
        return
    config = model.peft_config[ADAPTER].to_dict() | {"base_model_name_or_path": parent.base, "inference_mode": True}
    if parent.adapter is not None and config["trainable_token_indices"] is None:  # folded into the base for training
        tensors |= token_rows(parent.adapter)
        config["trainable_token_indices"] = LoraConfig.from_pretrained(parent.adapter).trainable_token_indices
    with disk_errors(output):
        save_file(tensors, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, default=_as_json)
    (output / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    save_quantisation(model.get_base_model(), output)


def _as_json(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"the adapter's configuration holds {value!r}, which JSON cannot hold")


def _save_weights(model: PreTrainedModel, output: Path, dtype: str) -> None:
    for parameter in model.parameters():  # not model.to(): that would also round buffers such as rotary frequencies
        parameter.data = parameter.data.to(DTYPES[dtype])
    with disk_errors(output):
        write_files(model, output)


def _save_slices(model: PreTrainedModel, output: Path, dtype: str) -> None:
    """Gather the weights one by one, all of them in the memory of process 0, and write them there."""
    gathered: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in gathered:  # tied weights are gathered, and written, once
            own = parameter.data.to_local() if isinstance(parameter.data, DTensor) else parameter.data
            own.copy_(own.to(DTYPES[dtype]))
            whole = _whole(name, parameter).to(DTYPES[dtype])
            gathered[id(parameter)] = whole if writes() else whole[:0]
        state[name] = gathered[id(parameter)]
    if not writes():
        return
    kept = {name: buffer for name, buffer in model.state_dict().items() if name not in state}
    with torch.device("meta"):  # a model of the same class, as slicing changed that of this one
        shell = AutoModelForCausalLM.from_config(model.config, dtype=DTYPES[dtype])
    shell.generation_config = model.generation_config
    with disk_errors(output):
        write_files(shell, output, state_dict=state | kept)


def write_files(model: PreTrainedModel, output: Path, **options: Any) -> None:
    """Write configuration and weights by transformers; ``options`` are its own."""
    # Where DeepSpeed is installed, accelerate imports it, for seconds, to see that the model is none of its engines.
    hidden = "deepspeed" not in sys.modules
    if hidden:
        vars(sys)["modules"]["deepspeed"] = None
    try:
        model.save_pretrained(output, max_shard_size=SHARD_SIZE, **options)
    finally:
        if hidden:
            del sys.modules["deepspeed"]


def _save_generation(model: PreTrainedModel | PeftModel, parent: ModelSource, output: Path) -> None:
    """Write the generation settings of the weights, which also end at the stop tokens of the chat template.

    An adapter has them too: whoever serves it finds the end of its answers.
    """
    own = parent.model / GENERATION_CONFIG
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    values = read_json(own) if own.is_file() else causal.generation_config.to_diff_dict()
    ends = values.get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if missing := [end for end in answer_ends(load_tokenizer(parent)) if end not in known]:
        values["eos_token_id"] = [*known, *missing] if known or len(missing) > 1 else missing[0]
    elif own.is_file():
        shutil.copyfile(own, output / GENERATION_CONFIG)
        return
    (output / GENERATION_CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_tokenizer(parent: ModelSource, output: Path) -> None:
    for name in TOKENIZER_FILES:
        if (parent.tokenizer / name).is_file():
            shutil.copyfile(parent.tokenizer / name, output / name)
    if parent.added_tokens:
        tokenizer = load_stored_tokenizer(parent)
        add_tokens(tokenizer, parent.added_tokens)
        tokenizer.save_pretrained(output)
    (output / TEMPLATE).write_bytes(parent.chat_template.encode())
    _drop_template(output / TOKENIZER_CONFIG)


def _drop_template(path: Path) -> None:
    """Remove the template from a tokenizer_config.json: only the pinned one beside it counts."""
    settings = read_json(path) if path.exists() else {}
    if settings.pop("chat_template", None) is not None:
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
