"""The machine that a plan is for: this one, or one of conf/machines.yaml by its name."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.config.paths import shipped
from posttrain.cost.engines import device_memory, gpus
from posttrain.environment import cores
from posttrain.errors import nearest, reject
from posttrain.model.device import expects_metal

Share = tuple[float, float, float]
"""Part of a rate that a training reaches: low, likely and high."""
DOUBT = 1.25
"""Factor by which the bounds of a speed that nobody measured move out: the planned and published are so far apart."""
SIZES = {"GB": 10**9, "GIB": 2**30, "G": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices of one kind, and their speed as far as it is known."""

    name: str
    """Name of the device; empty where nothing but its memory is known."""
    count: int
    """Devices that train together."""
    memory: int | None
    """Bytes of each; None when they are not known."""
    is_gpu: bool
    cores: int = 1
    """Cores of each device that is a CPU."""
    rates: Mapping[str, float] | None = None
    """Operations a second of one device in matrix products, by number format; None for an unknown one."""
    shares: Mapping[str, Share] | None = None
    """Part of the rate that a training reaches, by method."""
    bandwidth: float = 0.0
    """Bytes a second from a device's memory; 0 when it is not known."""
    measured: bool = False
    """True when rate and shares were measured; else they are of data sheets and published runs."""

    @property
    def source(self) -> str:
        """The origin of its figures, for people."""
        if self.measured:
            return "as measured on such a processor"
        return "by data sheet and published runs, not measured, with wider bounds for it"


def this_machine(processes: int, per_node: int) -> Machine:
    """Return this machine for a number of processes, of which ``per_node`` share it."""
    memory, is_gpu = device_memory(per_node), bool(gpus())
    each = 1 if is_gpu else max(1, cores() // per_node)
    name = _gpu_name() if is_gpu else _cpu_name()
    if expects_metal():  # the GPU has the memory of the machine
        name = f"{name} by Metal, in float32"
    return _machine(name, processes, memory, is_gpu=is_gpu, cores=each)


def named_machine(text: str, processes: int, key: str = "") -> Machine:
    """Return the GPUs that a word of the command names: ``H100``, ``8 x H100``, ``24GB`` or ``8 x 80GB``.

    ``processes`` is their number where the word gives none; ``key`` is what stands before it, such as ``on=``. Raises
    BadInput for an unknown one.
    """
    found = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?(.+?)\s*", text, re.IGNORECASE)
    count, what = (int(found[1] or processes), found[2]) if found else (0, text)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", what)
    unit = SIZES.get(size[2].upper()) if size else None
    if count > 0 and size and unit and float(size[1]) > 0:
        return Machine(name="", count=count, memory=int(float(size[1]) * unit), is_gpu=True)
    name = _known("gpus", what)
    if count < 1 or name is None:
        forms = f"Write a GPU, {key}H100, its memory, {key}24GB, or several, {key}'8 x H100'"
        known = list(_table()["gpus"])
        size = size or re.fullmatch(r"(\d+)\s*[A-Za-z]+", text)  # the x may be part of a misspelt unit
        close = f"{size[1]}GB" if size and float(size[1]) > 0 else nearest(what, known)
        fix = f"Did you mean {key}{close}? {forms}" if close and count > 0 else forms
        reject(f"{key}{text}", "names no GPU with figures and no memory", f"{fix}. GPUs: {', '.join(sorted(known))}")
    return _machine(name, count, _table()["gpus"][name]["memory"] * 10**9, is_gpu=True)


def _machine(name: str, count: int, memory: int | None, *, is_gpu: bool, cores: int = 1) -> Machine:
    table, group = _table(), "gpus" if is_gpu else "cpus"
    if (key := _known(group, name)) is None:
        return Machine(name=name, count=count, memory=memory, is_gpu=is_gpu, cores=cores)
    entry = table[group][key]
    shares = entry.get("shares") or table["shares"]["gpu" if is_gpu else "cpu"]
    return Machine(
        name=name, count=count, memory=memory, is_gpu=is_gpu, cores=cores,
        rates={kind: rate * 1e12 * cores for kind, rate in entry["rate"].items()},
        shares={method: tuple(share) for method, share in shares.items()},
        bandwidth=entry.get("bandwidth", 0.0) * 1e9, measured=entry.get("measured", False),
    )  # fmt: skip


def _known(group: str, name: str) -> str | None:
    """Return the key of the first device of which the name is part of ``name``; digits are never cut."""
    given = re.sub(r"\W", "", name.lower())
    return next((key for key in _table()[group] if re.search(re.sub(r"\W", "", key.lower()) + r"(?!\d)", given)), None)


@cache
def _table() -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load((shipped("conf") / "machines.yaml").read_text(encoding="utf-8"))
    return found


def _gpu_name() -> str:
    return _answer("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "this GPU"


def _answer(tool: str, *words: str) -> str:
    """Return the first line that a program of the system prints; nothing where it is missing or fails."""
    try:
        command = [shutil.which(tool) or tool, *words]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return (found.splitlines() or [""])[0].strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return _answer("sysctl", "-n", "machdep.cpu.brand_string") or "this processor"
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else "this processor"
