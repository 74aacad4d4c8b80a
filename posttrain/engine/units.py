"""The units that engines slice a model by: its layers, and what lies outside of layers; one is whole at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from posttrain.engine.arithmetic import Arithmetic
from posttrain.engine.attention_kernels import ALONE, Kernel
from posttrain.errors import reject
from posttrain.model.loading import DTYPES
from posttrain.model.targets import text_decoder

EXPERT = re.compile(r"\bexperts\.\d+\.")


def units(causal: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Yield each layer, and in the end the model, for what is left: the embeddings, the last norm, the projection."""
    lists = [each for each in text_decoder(causal).modules() if isinstance(each, torch.nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in lists]
    yield from list(lists[sizes.index(max(sizes))]) if lists else []
    yield causal


def convert(unit: torch.nn.Module, arithmetic: Arithmetic) -> None:
    """Bring the whole weights of ``unit`` into their formats: trained ones into float32, frozen ones as ``single``."""
    for parameter in unit.parameters():
        sliced = isinstance(parameter.data, DTensor) or not parameter.numel()
        if sliced or not parameter.is_floating_point():
            continue
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        else:
            parameter.data = parameter.data.to(DTYPES[arithmetic.stored]).to(DTYPES[arithmetic.dtype])


def reject_lone_documents(model: torch.nn.Module, kernel: Kernel, engine: str) -> None:
    """Raise BadInput for a model that computes each document alone.

    Its layers are gathered once for each document, of which batches have different numbers, but all processes gather
    together: they would wait for each other without end.
    """
    if kernel == ALONE:
        what = f"{engine} cannot train {type(model).__name__}, which computes each document alone"
        reject("engine", what, "Use engine=ddp")


def reject_lone_experts(model: torch.nn.Module, engine: str) -> None:
    """Raise BadInput for a model with trained experts that are layers of their own.

    An expert that no token of one process reaches has no gradient there, and the sum over processes would mix up what
    the others send. Experts that are one weight of three dimensions always have one.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and EXPERT.search(name):
            what = f"{engine} cannot train experts that are layers of their own ({name})"
            reject("engine", what, "Use engine=ddp, or leave the experts out of lora.target_modules")
