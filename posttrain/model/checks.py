"""Checks of a stage's output before it is published. They read safetensors and load no model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from posttrain.artifact import ModelSource
from posttrain.chat_template import check_template
from posttrain.errors import ArtifactDamaged
from posttrain.model.base import ADAPTER_WEIGHTS

LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>A|B)\.weight")


def check_output(output: Path, parent: ModelSource) -> None:
    """Raise ArtifactDamaged when a stage's ``output`` is not a sound, changed model.

    Every weight must be finite. An adapter must hold both halves of each pair at its rank, cover every target module,
    and add something; on a parent's adapter, it must have the same tensors with other values. Full weights must have
    the parent's tensors with other values. The chat template must be the parent's.
    """
    check_template(output, parent.chat_template)
    if (output / "adapter_config.json").exists():
        _check_adapter(output, parent)
    else:
        _check_weights(output, parent)


def _check_adapter(output: Path, parent: ModelSource) -> None:
    file, config = output / ADAPTER_WEIGHTS, _adapter_config(output)
    with _tensors(output, ADAPTER_WEIGHTS) as tensors:
        _check_finite(file, tensors)
        _check_pairs(file, tensors, config)
        if config["lora_alpha"] == 0 or not _adds(tensors):
            raise ArtifactDamaged(
                f"{file}: the adapter changes nothing: every lora_B times lora_A is zero; was the learning rate 0?"
            )
        if parent.adapter is not None:
            with _tensors(parent.adapter, ADAPTER_WEIGHTS) as before:
                _check_changed(output, tensors, before, parent)


def _check_weights(output: Path, parent: ModelSource) -> None:
    with _tensors(output, "model*.safetensors") as tensors, _tensors(parent.model, "model*.safetensors") as before:
        _check_finite(output, tensors)
        _check_changed(output, tensors, before, parent, _grown(output, parent))


def _grown(output: Path, parent: ModelSource) -> tuple[int, int] | None:
    """Return the number of embedding rows before and after training, when tokens were added; else None."""
    if not parent.added_tokens:
        return None
    before, after = (AutoConfig.from_pretrained(folder).get_text_config() for folder in (parent.model, output))
    return before.vocab_size, after.vocab_size


@contextmanager
def _tensors(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """Open the weights in ``folder``: the file of every tensor, by the tensor's name."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise ArtifactDamaged(f"{folder} holds no weights: {pattern} is missing")
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        except (SafetensorError, OSError) as error:
            raise ArtifactDamaged(f"{folder}: the weights cannot be read: {error}") from None
        yield {name: file for file in files for name in file.keys()}  # noqa: SIM118  safe_open is no mapping


def _read(tensors: dict[str, Any], name: str) -> torch.Tensor:
    tensor: torch.Tensor = tensors[name].get_tensor(name)
    return tensor


def _check_finite(path: Path, tensors: dict[str, Any]) -> None:
    if not tensors:
        raise ArtifactDamaged(f"{path} holds no weights: its safetensors file is empty")
    for name in tensors:
        if not torch.isfinite(_read(tensors, name)).all():
            raise ArtifactDamaged(f"{path}: weight {name} holds NaN or infinity")


def _adds(tensors: dict[str, Any]) -> bool:
    """Return True when the product of a pair is not zero, or a tensor beside the pairs.

    DoRA's lengths and added tokens do not start at 0, so they show nothing: for those, logits are compared.
    """
    if not is_low_rank(tensors):
        return any(torch.count_nonzero(_read(tensors, name)) for name in tensors if ".lora_A." not in name)
    halves = [name.replace(".lora_A.", ".lora_{}.") for name in tensors if ".lora_A." in name]
    pairs = ((_read(tensors, name.format("B")), _read(tensors, name.format("A"))) for name in halves)
    return any(torch.count_nonzero(b @ a) for b, a in pairs)


def is_low_rank(names: Iterable[str]) -> bool:
    """Return True when the tensors of an adapter are pairs of lora_A and lora_B, and nothing else."""
    return all(map(LORA_KEY.fullmatch, names))


def _check_pairs(file: Path, tensors: dict[str, Any], config: Mapping[str, Any]) -> None:
    pairs: dict[str, dict[str, list[int]]] = {}
    for name in tensors:
        if match := LORA_KEY.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["half"]] = tensors[name].get_slice(name).get_shape()
    if not pairs:
        raise ArtifactDamaged(f"{file}: the adapter holds no lora_A and lora_B weights")
    for module, shapes in pairs.items():
        if set(shapes) != {"A", "B"}:
            raise ArtifactDamaged(f"{file}: the adapter holds only lora_{next(iter(shapes))} for {module}")
        if shapes["A"][0] != shapes["B"][1]:
            raise ArtifactDamaged(
                f"{file}: lora_A and lora_B of {module} have ranks {shapes['A'][0]} and {shapes['B'][1]}"
            )
        experts = (
            shapes["A"][0] // config["r"] if config["target_parameters"] else 1
        )  # peft stacks those of a parameter
        if not config["rank_pattern"] and shapes["A"][0] != config["r"] * experts:
            raise ArtifactDamaged(f"{file}: {module} has rank {shapes['A'][0]}, adapter_config.json says {config['r']}")
    targets = config["target_modules"] if isinstance(config["target_modules"], list) else []
    for target in targets:
        if not any(f".{module}".endswith(f".{target}") for module in pairs):
            raise ArtifactDamaged(f"{file}: the adapter holds no weights for its target module {target}")


def _adapter_config(output: Path) -> dict[str, Any]:
    try:
        config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
        found = {
            "r": config["r"],
            "target_modules": config["target_modules"],
            "lora_alpha": config.get("lora_alpha", 8),
        }
        found |= {"rank_pattern": config.get("rank_pattern"), "modules_to_save": config.get("modules_to_save")}
        found["target_parameters"] = config.get("target_parameters")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactDamaged(f"{output}: adapter_config.json describes no LoRA adapter: {error!r}") from None
    if found["modules_to_save"]:
        raise ArtifactDamaged(
            f"{output}: the adapter holds whole copies of {found['modules_to_save']} (modules_to_save); "
            "train new tokens with model.added_tokens"
        )
    return found


def _check_changed(
    output: Path,
    after: dict[str, Any],
    before: dict[str, Any],
    parent: ModelSource,
    grown: tuple[int, int] | None = None,
) -> None:
    # A tied output projection may be stored on one side only.
    differing = sorted(name for name in set(after) ^ set(before) if not name.endswith("lm_head.weight"))
    if differing:
        raise ArtifactDamaged(f"{output}: weight {differing[0]} is not in both the result and its parent {parent.name}")
    same = True
    for name in sorted(set(after) & set(before)):
        new, old = _read(after, name), _read(before, name)
        if (old.shape[0], new.shape[0]) == grown:
            new = new[: old.shape[0]]  # added rows differ in any case; only the known ones show training
        if new.shape != old.shape:
            raise ArtifactDamaged(
                f"{output}: weight {name} has shape {tuple(new.shape)}, its parent's {tuple(old.shape)}"
            )
        same = same and torch.equal(new, old.to(new.dtype))
    if same:
        raise ArtifactDamaged(
            f"{output}: training changed nothing: every weight equals {parent.name}'s; was the learning rate 0?"
        )
