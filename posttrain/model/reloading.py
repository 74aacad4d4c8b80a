"""What a stage saved, loaded again as anyone would load it: it must be the model that was trained.

Bytes that are sound can still be another model: weights of another step, another base, a key that no module takes and
that is left out in silence, a scale that was lost. So every tensor is named in advance from the adapter's configuration
and the base, and the logits of what is loaded are held to those that the model had in memory.
"""

# T = tokens, V = vocabulary

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.artifact import ModelSource, quantization_of
from posttrain.errors import ArtifactDamaged
from posttrain.model.base import ADAPTER_WEIGHTS
from posttrain.model.loading import ADAPTER, added_token_ids, load_model
from posttrain.model.probe import Probe, difference, logits

RELOADED_LIMITS = {"float32": 1e-5, "bfloat16": 0.01}
"""Largest difference from the logits in memory, relative to their spread; without patched kernels there is none."""
SHARE = 0.1
"""Largest difference, as a share of what training changed."""


def check_reloaded(output: Path, parent: ModelSource, dtype: str) -> None:
    """Raise ArtifactDamaged when what is loaded from ``output`` is not the trained model, or is its parent still.

    An adapter must hold exactly the tensors that its configuration implies on the parent's base. The logits are held
    to the probe that ``StageContext.save`` left, which is removed. Where a plugin carries out stages in its own way and
    leaves none, nothing is known of the model in memory, and nothing is loaded.
    """
    probe = Probe.take(output)
    if probe is None:
        return
    if torch.cuda.is_available():  # two models may not fit
        gc.collect()
        torch.cuda.empty_cache()
    source = _saved_source(output, parent)
    if source.adapter is not None:
        check_tensors(output, parent)
    found_TV, parents_TV = probe_both(source, parent, dtype, probe.ids)
    limit = RELOADED_LIMITS[dtype]
    error, change = difference(found_TV, probe.logits), difference(parents_TV, probe.logits)
    if not error <= min(limit, SHARE * change):
        raise ArtifactDamaged(
            f"{output}: what is loaded from it is not the model that was trained: the logits differ by {error:.1e} of "
            f"their spread (at most {limit:.0e}, and a tenth of the {change:.1e} that training changed)"
        )
    if torch.equal(found_TV, parents_TV):
        raise ArtifactDamaged(f"{output}: it computes what {parent.name} computes; was the learning rate 0?")


def check_tensors(output: Path, parent: ModelSource) -> None:
    """Raise ArtifactDamaged naming the first tensor of an adapter that is missing, not implied, or of another form."""
    for name, kind in sorted(check_names(output, parent).items()):
        if kind != "F32":
            raise ArtifactDamaged(f"{output}: {name} is saved as {kind}, and adapters are trained in float32")


def check_names(output: Path, parent: ModelSource, embeddings: bool = False) -> dict[str, str]:
    """The number format of every tensor of an adapter, by name.

    Raises ArtifactDamaged naming the first one that is missing, not implied by the adapter's configuration on the
    parent's base, or of another shape: peft loads what fits and leaves out the rest. With ``embeddings``, those of the
    base may be among them, as peft saves them on its own where they are adapted.
    """
    expected = _implied_shapes(output, parent)
    allowed = _implied_shapes(output, parent, embeddings=True) if embeddings else expected
    with safe_open(output / ADAPTER_WEIGHTS, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    for names, what in (
        (expected.keys() - found.keys(), "lacks"),
        (found.keys() - allowed.keys(), "has no place for"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ArtifactDamaged(f"{output}: the adapter {what} {min(names)}{more}")
    for name, (shape, _) in sorted(found.items()):
        if shape != allowed[name]:
            raise ArtifactDamaged(f"{output}: {name} has shape {shape}, on {parent.base} it is {allowed[name]}")
    return {name: kind for name, (_, kind) in found.items()}


def _implied_shapes(output: Path, parent: ModelSource, embeddings: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an adapter with this configuration on the base, without loading weights."""
    config = LoraConfig.from_pretrained(output)
    config.base_model_name_or_path = None  # peft warns of any other than the model's, which has no name here
    added = added_token_ids(parent)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(parent.model))
        if added and max(added) >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(max(added) + 1, mean_resizing=False)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    state = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=embeddings)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _saved_source(output: Path, parent: ModelSource) -> ModelSource:
    if (output / "adapter_config.json").exists():
        return replace(parent, adapter=output, tokenizer=output, quantization=quantization_of(output))
    return replace(parent, model=output, adapter=None, tokenizer=output, quantization=None, added_tokens=())


def probe_both(
    source: ModelSource, parent: ModelSource, dtype: str, ids_1T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] of the saved model and of its parent, on weights quantised alike."""
    model = load_model(source, dtype)
    found_TV = logits(model, ids_1T)
    if isinstance(model, PeftModel) and parent.adapter is None:
        with model.disable_adapter():
            return found_TV, logits(model, ids_1T)
    del model
    return found_TV, logits(load_model(replace(parent, quantization=source.quantization), dtype), ids_1T)
