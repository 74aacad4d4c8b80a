"""One optimizer step shared by two processes: each takes half of the rows, and their gradients are summed."""

from __future__ import annotations

import logging
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import spawn

from posttrain.engine.config import FineTuneConfig
from posttrain.tokens.packing import PackedRow

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

RANKS = 2
RESULT = "gradient.safetensors"


def gradient_of_ranks(
    model: PreTrainedModel | PeftModel, rows: Sequence[PackedRow], config: FineTuneConfig
) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss over all ranks' trained tokens, by parameter name.

    Starts two processes connected by gloo. Raises torch's ProcessException when one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        # by value: shared memory is often too small for a model, in containers above all
        task = pickle.dumps((model, list(rows), config))
        spawn(_rank, args=(task, folder), nprocs=RANKS)
        return load_file(Path(folder) / RESULT)


def _rank(rank: int, task: bytes, folder: str) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft; it warns of missing kernels
    from posttrain.engine.gradient import add_gradient, trained_tokens

    torch.set_num_threads(max(1, torch.get_num_threads() // RANKS))
    model, rows, config = pickle.loads(task)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    share = rows[rank::RANKS]
    # the divisor is the number of trained tokens on all ranks: each rank's own would make a mean of means of the sum
    trained = torch.tensor(trained_tokens(share))
    dist.all_reduce(trained)
    add_gradient(model, share, int(trained), config, "float32")
    summed = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            summed[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(summed[name])
    if rank == 0:
        save_file(summed, Path(folder) / RESULT)
    dist.destroy_process_group()
