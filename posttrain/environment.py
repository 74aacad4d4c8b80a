"""The environment of the process: its variables, set before torch and its companions are imported, and its cores."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator

DEFAULTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would tell its makers of every file that lm_eval reads
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # what Metal has no kernel for, the CPU computes
    # DistributedDataParallel warns that it looks for unused parameters in vain, which is what it is asked to do.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Idle OpenMP threads sleep instead of spinning: on cores that are shared, spinning made runs ten times slower.
    "OMP_WAIT_POLICY": "passive",
}
"""Environment variables; the user's own values win."""
NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""Environment variable, read when a function is handed to torch.compile."""


def prepare() -> None:
    """Set the defaults, and hide the libraries' warnings about their own future versions."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # peft looks for them among modules alone, and finds those of bare parameters all the same
    warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of faster kernels whenever peft imports it


@contextlib.contextmanager
def importing(*, others: bool = False) -> Iterator[None]:
    """Import torch and its companions inside the context, without what would take a third of the time.

    Nothing looks for garbage while they load, nor among them later, as they stay.
    bitsandbytes, which peft imports, would load torch's compiler for stand-ins of its kernels, which stay as they are.
    With ``others``, what modules of other people have compiled is compiled.
    """
    looks, fresh = gc.isenabled(), "torch" not in sys.modules
    given = os.environ.get(NO_COMPILER)
    if not others:
        os.environ[NO_COMPILER] = "1"
    gc.disable()
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(NO_COMPILER, None)
        else:
            os.environ[NO_COMPILER] = given
        if fresh and "torch" in sys.modules:
            gc.freeze()
        if looks:
            gc.enable()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
