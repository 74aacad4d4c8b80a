"""Loading of models and tokenizers: from local files only, never with code from a model's repository.

Number formats: with ``bfloat16``, frozen weights are bfloat16 and trained weights float32, because an update of
relative size 1e-4 is lost when it is added to a bfloat16 weight (8 bits of precision). Adapters are float32 on a
bfloat16 base. Full fine-tuning loads the weights in float32 and computes under bfloat16 autocast: no more memory than
bfloat16 weights beside float32 master copies, and no copying between the two. Quantised weights are multiplied in the
given format; the others are held in it. ``WIDENED`` weights are rounded to bfloat16 first: the model as it is trained
and published, computed in float32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from posttrain.artifact import ModelSource
from posttrain.chat_template import render_pinned
from posttrain.config.schema import LoraSettings
from posttrain.errors import FOREIGN, ArtifactDamaged, BadInput, Problem, brief, reject
from posttrain.model.added_tokens import (
    DELTA,
    add_embeddings,
    add_tokens,
    embedding_layers,
    fit_rows,
    fold_token_rows,
    reject_known,
)
from posttrain.model.base import ADAPTER_WEIGHTS, weight_files
from posttrain.model.device import default_device, exact_device
from posttrain.model.quantisation import keep_layout, quantisation_config
from posttrain.model.targets import WHERE, resolve_targets
from posttrain.model.tokenizer_watch import TokenizerWatch
from posttrain.model.trust import check_adapter, foreign

ADAPTER = "default"
"""Name of the trained adapter: peft's default."""

PADDING = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Existing tokens for padding, best first."""

AS_STORED = "auto"
"""transformers' name of the number format that the files of the weights have."""
WIDENED = "bfloat16 in float32"
"""Number format of bfloat16 weights that are held, and multiplied, in float32."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its pinned chat template, the added tokens, and an existing token for padding.

    The values of the template's variables are part of every rendering by it.
    """
    tokenizer = load_stored_tokenizer(source)
    add_tokens(tokenizer, source.added_tokens)
    tokenizer.chat_template = source.chat_template
    if source.template_variables:
        pinned = functools.partial(render_pinned, tokenizer.apply_chat_template, source.template_variables)
        # On the tokenizer itself: lm_eval, trl and plugins render by it without knowing of any variable.
        vars(tokenizer)["apply_chat_template"] = pinned
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PADDING if token in vocabulary), tokenizer.eos_token)
    return tokenizer


def added_token_ids(source: ModelSource) -> list[int]:
    """Return the ids of the tokens added to ``source``, missing from its weights."""
    return add_tokens(load_stored_tokenizer(source), source.added_tokens) if source.added_tokens else []


def load_model(source: ModelSource, dtype: str, mapped: bool = False) -> PreTrainedModel | PeftModel:
    """Load the model for inference, in evaluation mode, with its adapter if it has one.

    ``dtype`` is ``float32``, ``bfloat16`` or ``WIDENED``, which quantised weights are not. ``mapped`` leaves the
    weights in their files, mapped into memory, until something copies them: processes that take slices share them. It
    does so for files in the format ``dtype``; quantised weights are loaded all the same.
    """
    widened = dtype == WIDENED
    model = _load_weights(source, "bfloat16" if widened else dtype, mapped)
    if widened and source.quantization is None:
        model = model.float()
    if source.adapter is not None:
        model = attach(model, source.adapter, source.rows)
    return model.eval()


def number_format(dtype: str, compute_dtype: str) -> str:
    """Return the format in which ``load_model`` gives weights of ``dtype`` for arithmetic in ``compute_dtype``."""
    return WIDENED if (dtype, compute_dtype) == ("bfloat16", "float32") else dtype


def attach(
    model: PreTrainedModel | PeftModel, adapter: Path, rows: int | None = None, name: str = ADAPTER, **options: Any
) -> PeftModel:
    """Put the adapter in the folder ``adapter`` on ``model``, which may change its weights; ``options`` are peft's.

    ``rows`` are those of the embeddings that the adapter was trained with, where the model has others. A model with
    adapters takes one more under another ``name``; the active one stays active.

    The same numbers are drawn every time: fast PiSSA takes the base apart with random ones. Raises ArtifactDamaged
    when a tensor of the adapter is missing or has no place: peft would leave it out in silence; BadInput when peft
    cannot read it, or when it would load code.
    """
    check_adapter(adapter)
    if rows is not None:
        fit_rows(model, rows)
    what = "the adapter cannot be attached"
    with foreign(adapter, what), torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # peft warns of what is checked below
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, adapter_name=name, **options)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, adapter, adapter_name=name, **options)
    _check_whole(adapted, adapter, name)
    return adapted


def _check_whole(model: PeftModel, adapter: Path, name: str) -> None:
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        found = {name for name in file.keys() if not name.endswith(DELTA)}  # noqa: SIM118  safe_open is no mapping
    own, whole = (
        set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings))
        for embeddings in (False, True)
    )
    own = {name for name in own if not name.endswith(DELTA)}  # rows of tokens may be folded into the weights
    for names, what in ((own - found, "lacks"), (found - whole, "has no place for")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ArtifactDamaged(f"{adapter / ADAPTER_WEIGHTS}: the adapter {what} {min(names)}{more}")


def load_trainable(source: ModelSource, dtype: str, mapped: bool = False) -> PreTrainedModel | PeftModel:
    """Load the model to train: the adapter ``default`` trainable, or else all weights, in float32 either way.

    With full weights and ``bfloat16``, the forward pass must run under bfloat16 autocast. The rows of added tokens
    beside an adapter are frozen. ``mapped`` is that of ``load_model``; full weights then stay in their files' format.
    Raises BadInput when a weight is not finite.
    """
    trained = AS_STORED if mapped else "float32"
    model = _load_weights(source, trained if source.adapter is None else dtype, mapped)
    if source.adapter is not None:
        config = fold_token_rows(model, source.adapter)
        model = attach(model, source.adapter, is_trainable=True, config=config)
    check_finite(model, source)
    return model


def new_adapter(model: PreTrainedModel, lora: LoraSettings, seed: int, tokens: Sequence[int] = ()) -> PeftModel:
    """Return ``model`` with a new adapter (LoRA, rsLoRA or DoRA) that changes nothing yet, drawn with ``seed``.

    The rows of ``tokens`` in the embeddings, and in an untied output projection, are trained as well.

    Raises BadInput when a target module does not exist or takes no adapter.
    """
    targets = resolve_targets(model, lora)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        fan_in_fan_out=targets.transposed,
        trainable_token_indices={name: list(tokens) for name in embedding_layers(model)} if tokens else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config, adapter_name=ADAPTER)
        except FOREIGN as error:
            what = f"{type(model).__name__} takes no such adapter: {brief(error)}"
            reject(WHERE, what, "Name the layers to adapt, or train all weights with method=full")


def check_finite(model: torch.nn.Module, source: ModelSource) -> None:
    """Raise BadInput naming the first weight of ``model`` that is empty, or has NaN or infinity.

    Quantising hides them, so the weights of a quantised model are read from its files again.
    """
    tensors = chain(model.named_parameters(), _stored_weights(source) if source.quantization else ())
    for name, tensor in tensors:
        if not tensor.numel() or not torch.isfinite(tensor).all():
            raise BadInput(
                Problem(
                    where=str(source.adapter or source.model),
                    what=f"weight {name} {'holds NaN or infinity' if tensor.numel() else 'is empty'}",
                    fix="Copy the model again, or use another one",
                )
            )


def _stored_weights(source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    for path in weight_files(source.model):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                yield name, file.get_tensor(name)


def _load_weights(source: ModelSource, dtype: str, mapped: bool = False) -> PreTrainedModel:
    logging.disable_progress_bar()  # the pipeline shows progress in a form of its own
    quantised: dict[str, Any] = {}
    mapped = mapped and source.quantization is None
    if source.quantization is not None:  # happens on the device of loading
        quantised["quantization_config"] = quantisation_config(source.quantization, DTYPES[dtype])
        # for Metal, bitsandbytes would fetch kernels from the hub
        quantised["device_map"] = {"": exact_device(default_device())}
    with foreign(source.model, "the model cannot be loaded"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.model,
            **quantised,
            dtype=DTYPES.get(dtype, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise BadInput(Problem(where=str(source.model), what=f"its weights lack {listed}", fix="Copy the model again"))
    if source.added_tokens:
        _add_rows(model, source)
    if quantised:
        keep_layout(model)
        return model
    return model if mapped else model.to(default_device())


def _add_rows(model: PreTrainedModel, source: ModelSource) -> None:
    if source.tokenizer == source.model:  # the base's own tokenizer; an artifact's has the tokens
        rows = model.get_input_embeddings().weight.shape[0]
        reject_known(source.added_tokens, load_stored_tokenizer(source), rows)
    add_embeddings(model, added_token_ids(source))


def load_stored_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer as its files describe it, without added tokens, and watch its texts from then on."""
    watch = TokenizerWatch(source.tokenizer)
    with foreign(source.tokenizer, "its tokenizer cannot be loaded"):
        with watch.watching(sum(path.stat().st_size for path in source.tokenizer.glob("tokenizer.*"))):
            tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, local_files_only=True, trust_remote_code=False)
        watch.guard(tokenizer)
        tokenizer("a b")  # many settings are only read with the first text
        return tokenizer
