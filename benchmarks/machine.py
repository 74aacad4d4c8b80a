"""The machine of a benchmark, as every result names it."""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("posttrain", "torch", "transformers", "peft", "trl", "lm_eval")


def described() -> dict[str, Any]:
    """Return date, device, threads and versions."""
    import torch

    return {
        "date": date.today().isoformat(),
        "device": device(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES if _is_installed(name)},
    }


def _is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:  # run from a source tree, or on a machine with less on it
        return False


def device() -> str:
    """Return the name of the GPU, or of the processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
             if line.startswith("model name")]  # fmt: skip
    return f"CPU {names[0] if names else platform.machine()}"


def now() -> float:
    """Return the seconds of a clock, after all work that a GPU has been given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """Return the peak of the memory in use since ``forget_peak``: of the GPU, or of this process."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def matrix_rate(shapes: Iterable[tuple[int, int]], tokens: int, dtype: str) -> float:
    """Measure the GFLOP/s of products of ``tokens`` activations with weights of these shapes, in ``dtype``."""
    import torch

    where = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    operations = seconds = 0.0
    for rows, columns in shapes:
        left = torch.randn(tokens, columns, **where).to(getattr(torch, dtype))
        right = torch.randn(rows, columns, **where).to(getattr(torch, dtype))
        operations += 2 * tokens * rows * columns
        seconds += min(_timed(left, right) for _ in range(20))
    return operations / seconds / 1e9


def _timed(left: Any, right: Any) -> float:
    import torch

    start = now()
    torch.nn.functional.linear(left, right)
    return now() - start


def torch_device() -> Any:
    """Return the device of a benchmark: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_dtype() -> Any:
    """Return the number format of a benchmark: bfloat16 on a GPU, float32 elsewhere."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def training_dtype_name() -> str:
    """Return the name of that format."""
    return str(training_dtype()).removeprefix("torch.")


def device_bytes() -> int:
    """Return the memory of the GPU; elsewhere there is no bound."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else sys.maxsize


def forget_peak() -> int:
    """Let the peak of the memory begin anew; return what is in use."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")
