"""Checkpoints of a TRL training run in safetensors and JSON: reading them unpickles nothing.

    <folder>/step-120/training.safetensors    trained weights, moments of the optimizer, position in the schedule
    <folder>/step-120/trainer_state.json      step, epoch and the log so far
    <folder>/step-120/sha256.json             digests of the two

Only the newest is kept. Random generators are not stored: dropout is off, and the order of the pairs follows from the
seed alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

TENSORS = "training.safetensors"
STATE = "trainer_state.json"
DIGESTS = "sha256.json"


def find_newest(folder: Path, note: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint in ``folder``, or None.

    Damaged ones are removed, with a ``note`` for each.
    """
    for path in sorted(folder.glob("step-*"), key=_step, reverse=True):
        if _is_whole(path):
            return path
        note(f"checkpoint {path.name} is damaged and not used")
        shutil.rmtree(path)
    return None


def save(folder: Path, model: torch.nn.Module, optimizer: Optimizer, scheduler: LRScheduler, state: Any) -> None:
    """Write the checkpoint of step ``state.global_step``, whole or not at all, then remove older ones."""
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    packed = optimizer.state_dict()
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in trained_parameters(model).items()}
    for index, moments in packed["state"].items():
        tensors |= {f"optimizer/{index}/{key}": tensor for key, tensor in moments.items()}
    settings = {"groups": packed["param_groups"], "schedule": scheduler.state_dict()}
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, draft / TENSORS, {"json": json.dumps(settings)})
    state.save_to_json(str(draft / STATE))
    (draft / DIGESTS).write_text(json.dumps(_digests(draft)))
    for path in (*draft.iterdir(), draft):
        _sync(path)
    older = list(folder.glob("step-*"))
    draft.rename(folder / f"step-{state.global_step}")
    _sync(folder)
    for path in older:
        shutil.rmtree(path)


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Put the trained weights of a checkpoint into ``model``, loaded from the stage's parent."""
    weights, _ = _read(checkpoint, "weight/")
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(weights[name])


def load_optimizer(checkpoint: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Restore the optimizer's moments and the position in the learning rate's schedule."""
    tensors, settings = _read(checkpoint, "optimizer/")
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split("/")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": settings["groups"]})
    scheduler.load_state_dict(settings["schedule"])


def seen_tokens(checkpoint: Path) -> int:
    """Return the number of tokens seen up to the checkpoint."""
    history = json.loads((checkpoint / STATE).read_text())["log_history"]
    return int(history[-1]["tokens"])


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _read(checkpoint: Path, prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(checkpoint / TENSORS, framework="pt") as stream:
        names = [name for name in stream.keys() if name.startswith(prefix)]  # noqa: SIM118  not a mapping
        tensors = {name.removeprefix(prefix): stream.get_tensor(name) for name in names}
        return tensors, json.loads(stream.metadata()["json"])


def _is_whole(checkpoint: Path) -> bool:
    try:
        written: Any = json.loads((checkpoint / DIGESTS).read_text())
        return bool(written == _digests(checkpoint))
    except (OSError, ValueError):
        return False


def _digests(checkpoint: Path) -> dict[str, str]:
    digests = {}
    for name in (TENSORS, STATE):
        with (checkpoint / name).open("rb") as stream:
            digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
