"""The device that this process computes on, and the place of its sums in float64.

A GPU where there is one, by CUDA or by Metal, else the CPU; ``POSTTRAIN_DEVICE`` names one. Metal has no float64: what
is to be summed in it moves to the CPU, and takes the same operations in the same order there.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.errors import reject, suggest

if TYPE_CHECKING:
    import torch

VARIABLE = "POSTTRAIN_DEVICE"
AUTO, CPU, CUDA, METAL = "auto", "cpu", "cuda", "mps"
DEVICES = (AUTO, CPU, CUDA, METAL)
"""Values of the variable; the last is torch's name of Metal."""


def chosen() -> str:
    """Return the kind of device that the environment names, ``auto`` by default. Raises BadInput for an unknown one."""
    word = os.environ.get(VARIABLE) or AUTO
    if word not in DEVICES:
        reject(VARIABLE, f"{word!r} is no device", suggest(word, DEVICES))
    return word


def default_device() -> torch.device:
    """Return this process' GPU if there is one, else the CPU. Raises BadInput for a named device that is missing."""
    import torch

    word = chosen()
    if word in (AUTO, CUDA) and torch.cuda.is_available():
        return torch.device(CUDA, torch.cuda.current_device())
    if word in (AUTO, METAL) and has_metal():
        return torch.device(METAL)
    if word not in (AUTO, CPU):
        reject(VARIABLE, f"torch finds no device {word!r} on this machine", f"Set {VARIABLE}={AUTO}")
    return torch.device(CPU)


def has_metal() -> bool:
    """Return True on a Mac whose GPU torch can use."""
    import torch

    return torch.backends.mps.is_available()


def expects_metal() -> bool:
    """Return True where Metal will compute, as far as can be told without torch."""
    return sys.platform == "darwin" and platform.machine() == "arm64" and chosen() in (AUTO, METAL)


def exact_device(device: torch.device) -> torch.device:
    """Return the device that sums in float64 what ``device`` computes: itself, if it can."""
    import torch

    return torch.device(CPU) if device.type == METAL else device


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in float64, on the device that has it; a gradient finds its way back."""
    return tensor.to(exact_device(tensor.device)).double()


def generators() -> Mapping[str, Any]:
    """Return torch's modules with the random generators of GPUs in use, by kind of device."""
    import torch

    used = {CUDA} if torch.cuda.is_available() else {default_device().type} - {CPU}
    return {kind: torch.get_device_module(kind) for kind in sorted(used)}
