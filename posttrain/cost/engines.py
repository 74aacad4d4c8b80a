"""The engine of a stage: the first that fits into a device's memory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from posttrain.model import device as devices

HEADROOM = 0.9
"""Share of a device's memory that a training may plan with: libraries and the allocator take the rest."""
AUTO, SINGLE = "auto", "single"
EXTRAS = {"deepspeed": "deepspeed"}
"""Engines that need a distribution of an extra, with the name of both."""


def choose_engine(setting: str, processes: int, need: int | None, device: int | None) -> tuple[str, str]:
    """Return the engine for ``setting`` on a number of processes, and one clause with the reason.

    ``need`` is the bytes for everything on each device, ``device`` the bytes it has; None when they are not known.
    ``auto`` is single on one device, ddp where everything fits on each, else fsdp.
    """
    if processes == 1:
        return SINGLE, "there is one device"
    if setting != AUTO:
        return setting, "as set"
    if need is None or device is None:
        return "fsdp", "it is not known what fits on a device"
    if need <= HEADROOM * device:
        return "ddp", f"everything fits on each device: {gigabytes(need)} of {gigabytes(device)}"
    return "fsdp", f"with everything on each device it takes {gigabytes(need)} of {gigabytes(device)}"


def missing_extra(engine: str) -> str | None:
    """Return the extra of this distribution that ``engine`` needs and that is not installed."""
    extra = EXTRAS.get(engine)
    return extra if extra is not None and importlib.util.find_spec(extra) is None else None


def device_memory(processes: int = 1) -> int | None:
    """Return the bytes of the smallest GPU, or of this machine's share for one of ``processes`` on its CPU."""
    if gpus() and (tool := shutil.which("nvidia-smi")):
        command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
            return min(int(size) for size in found) * 2**20
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
    if not hasattr(os, "sysconf"):  # Windows
        import psutil

        return int(psutil.virtual_memory().total) // processes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def gpus() -> int:
    """Return the number of CUDA's GPUs that this process may use; torch is not asked, because a plan imports none."""
    if devices.chosen() not in (devices.AUTO, devices.CUDA):
        return 0
    found = sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = found if visible is None else len([word for word in visible.split(",") if word.strip() not in ("", "-1")])
    return min(found, named)


def gigabytes(size: float) -> str:
    """Return a number of bytes for people, in GB."""
    amount = size / 1e9
    return f"{amount:.0f} GB" if amount >= 100 else f"{amount:.1f} GB" if amount >= 1 else f"{amount:.2f} GB"
