"""Proof that a stage's output, loaded as anyone would load it, is the trained model.

Sound bytes can still be another model: weights of another step, another base, a key left out in silence because no
module fits, a lost scale. Two proofs exclude these: every tensor's name and shape follow from the adapter's
configuration and the base, and the loaded model's logits agree with those of the model in memory.
"""

# T = tokens, V = vocabulary

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from posttrain.artifact import ModelSource, quantization_of
from posttrain.errors import ArtifactDamaged
from posttrain.model.base import ADAPTER_WEIGHTS
from posttrain.model.checks import check_output, is_low_rank
from posttrain.model.loading import ADAPTER, added_token_ids, attach, load_model
from posttrain.model.probe import Probe, difference, logits, random_ids
from posttrain.model.trust import PATTERN_SECONDS, check_adapter, foreign

RELOADED_LIMITS = {"float32": 1e-5, "bfloat16": 0.01}
"""Largest difference from the logits in memory, relative to their spread; without patched kernels there is none."""
SHARE = 0.1
"""Largest difference, as a share of the change by training: a tiny change must be saved just as well."""


def check_reloaded(output: Path, parent: ModelSource, dtype: str) -> None:
    """Raise ArtifactDamaged when the model loaded from ``output`` is not the trained one, or is still its parent.

    An adapter must hold exactly the tensors implied by its configuration on the parent's base. The logits are compared
    with the probe written by ``StageContext.save``, and its file is removed. Without a probe, as from a plugin with its
    own way to run stages, nothing is known of the model in memory, and nothing is loaded.
    """
    probe = Probe.take(output)
    if probe is None:
        return
    if torch.cuda.is_available():  # the trained model may still fill the GPU
        gc.collect()
        torch.cuda.empty_cache()
    source = _saved_source(output, parent)
    dtype = probe.dtype or dtype
    if source.adapter is not None:
        check_tensors(output, parent)
    found_TV, parents_TV = probe_both(source, parent, dtype, probe.ids)
    limit = RELOADED_LIMITS[dtype]
    error, change = difference(found_TV, probe.logits), difference(parents_TV, probe.logits)
    if not error <= min(limit, SHARE * change):
        raise ArtifactDamaged(
            f"{output}: the model loaded from it is not the one that was trained: the logits differ by "
            f"{error:.1e} of their spread (allowed: {limit:.0e}, and a tenth of the {change:.1e} changed by training)"
        )
    if torch.equal(found_TV, parents_TV):
        raise ArtifactDamaged(
            f"{output}: training changed nothing: its logits equal {parent.name}'s; was the learning rate 0?"
        )


def check_published(path: Path, base: ModelSource, dtype: str) -> None:
    """Raise ArtifactDamaged when the weights of a published artifact are no sound, changed model on ``base``.

    A manifest shows that nobody changed a file since it was written, not who wrote it: an artifact signed by another
    hand is checked as any adapter is.
    """
    check_output(path, base)
    if not (path / "adapter_config.json").exists():
        return
    names = check_names(path, base, embeddings=True)
    if not is_low_rank(names):
        source = _saved_source(path, base)
        if torch.equal(*probe_both(source, base, dtype, random_ids(base_rows(base), added_token_ids(base)))):
            raise ArtifactDamaged(f"{path}: the adapter changes nothing: its logits are those of {base.base}")


def check_start(path: Path, base: ModelSource, dtype: str) -> None:
    """Raise ArtifactDamaged when the weights of an artifact to be trained on are no sound, changed model on ``base``.

    The tensors of a plain adapter are compared when it is loaded; of any other one, the logits are compared as well.
    """
    check_output(path, base)
    if (path / "adapter_config.json").exists():
        with safe_open(path / ADAPTER_WEIGHTS, framework="pt") as file:
            plain = is_low_rank(file.keys())
        if not plain:
            check_published(path, base, dtype)


def base_rows(base: ModelSource) -> int:
    """Return the number of tokens in the configuration of ``base``."""
    rows: int = AutoConfig.from_pretrained(base.model).get_text_config().vocab_size
    return rows


def check_tensors(output: Path, parent: ModelSource) -> None:
    """Raise ArtifactDamaged naming the first tensor of an adapter to be missing, not implied, or not in float32."""
    for name, kind in sorted(check_names(output, parent).items()):
        if kind != "F32":
            raise ArtifactDamaged(f"{output}: {name} is saved as {kind}, but adapters are trained in float32")


def check_names(output: Path, parent: ModelSource, embeddings: bool = False) -> dict[str, str]:
    """Return the number format of every tensor of an adapter, by name.

    Raises ArtifactDamaged naming the first tensor to be missing, not implied by the adapter's configuration on the
    parent's base, or of another shape: peft would load the fitting ones and drop the others in silence. With
    ``embeddings``, the base's may be among them: peft saves adapted embeddings whole.
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
            raise ArtifactDamaged(f"{output / ADAPTER_WEIGHTS}: the adapter {what} {min(names)}{more}")
    for name, (shape, _) in sorted(found.items()):
        if shape != allowed[name]:
            raise ArtifactDamaged(
                f"{output / ADAPTER_WEIGHTS}: {name} has shape {shape}, but {allowed[name]} on {parent.base}"
            )
    return {name: kind for name, (_, kind) in found.items()}


def _implied_shapes(output: Path, parent: ModelSource, embeddings: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of an adapter's tensors, from its configuration and the base's, without weights."""
    check_adapter(output)
    with foreign(output, "the adapter cannot be attached", PATTERN_SECONDS):
        return _imply_shapes(output, parent, embeddings)


def _imply_shapes(output: Path, parent: ModelSource, embeddings: bool) -> dict[str, tuple[int, ...]]:
    config = LoraConfig.from_pretrained(output)
    config.base_model_name_or_path = None  # peft warns unless it is the model's name; a model on meta has none
    added = added_token_ids(parent)
    model = empty_model(parent)
    with torch.device("meta"):
        known = model.get_input_embeddings().weight.shape[0]
        if (rows := parent.rows or max([known, *(number + 1 for number in added)])) != known:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    state = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=embeddings)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def empty_model(base: ModelSource) -> PreTrainedModel:
    """Return the model of ``base`` without weights, to see its layers."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.model))
    return model


def _saved_source(output: Path, parent: ModelSource) -> ModelSource:
    if (output / "adapter_config.json").exists():
        return replace(parent, adapter=output, tokenizer=output, quantization=quantization_of(output))
    return replace(parent, model=output, adapter=None, tokenizer=output, quantization=None, added_tokens=())


def probe_both(
    source: ModelSource, parent: ModelSource, dtype: str, ids_1T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [T, V] of the saved model and of its parent, on weights quantised alike.

    The parent is asked before the adapter is put on it: adapters may change the weights under them for good.
    """
    parent = replace(parent, quantization=source.quantization)
    model = load_model(parent, dtype)
    parents_TV = logits(model, ids_1T)
    if source.adapter is not None and parent.adapter is None and source.weights == parent.weights:
        return logits(attach(model, source.adapter, source.rows).eval(), ids_1T), parents_TV
    del model
    return logits(load_model(source, dtype), ids_1T), parents_TV
