"""The number format of a training's arithmetic: the faster one, measured once per machine and model.

Products of the model's own shapes are timed in float32 and in bfloat16. The rates are recorded beside the checkpoints,
so that a resumed run computes as it began, and in the user's cache, so that a machine always computes the same.
"""

# T = tokens of a product, R = rows and C = columns of a weight

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.digests import canonical, digest_of
from posttrain.disk import replace_text
from posttrain.engine.attention import causal_model
from posttrain.engine.config import LoopConfig
from posttrain.engine.precision import BFLOAT16, FLOAT32, autocasting, is_quantised
from posttrain.errors import ArtifactDamaged
from posttrain.model.loading import DTYPES, default_device
from posttrain.saved import read_as

MARGIN = 1.1
"""Times the rate of float32 that bfloat16 must reach: it is less exact, and a tie is noise."""
HOPELESS = 4.0
"""Ratio of the rates at which the smallest shapes decide: some processors multiply bfloat16 thirty times slower."""
TOKENS = 512
"""Most tokens of a timed product: beyond them the rate hardly changes."""
FEWEST = 64
"""Fewest tokens of a timed product: below them it measures the memory."""
OPERATIONS = 2e9
"""Operations in one round over all shapes, as far as FEWEST allows."""
ROUNDS = 3
"""Timed rounds after one to warm up; their median counts."""

Shapes = Mapping[tuple[int, int], int]
"""Number of weights by shape, (R, C)."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured rates of products, in GFLOP/s."""

    float32: float
    bfloat16: float


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The number format of forward and backward passes."""

    dtype: str
    stored: str
    """Format of the stored weights."""
    rates: Rates | None = None
    """The rates that decided; None when nothing had to be measured."""

    def __str__(self) -> str:
        text = f"{self.dtype} on weights stored as {self.stored}"
        if self.rates is None:
            return text
        rates = asdict(self.rates)
        taken = rates.pop(self.dtype)
        return f"{text} (measured: {taken:,.0f} against {rates.popitem()[1]:,.0f} GFLOP/s)"


def choose_arithmetic(config: LoopConfig, stored: str, model: PreTrainedModel | PeftModel, record: Path) -> Arithmetic:
    """Return the arithmetic for ``model``, with weights stored as ``stored``; ``record`` is the run's file of rates.

    A setting decides; quantised weights and float32 keep their format, and so do GPUs. A CPU takes the faster
    format for bfloat16 weights: as recorded, else as cached for this machine, else as measured.
    """
    dtype = stored
    if config.compute_dtype is not None and not is_quantised(model):
        dtype = config.compute_dtype.value
    elif stored == BFLOAT16 and default_device().type == "cpu" and not is_quantised(model):
        rates = _known_rates(config, model, record)
        return Arithmetic(dtype=_faster(rates), stored=stored, rates=rates)
    return Arithmetic(dtype=dtype, stored=stored)


def _faster(rates: Rates) -> str:
    return BFLOAT16 if rates.bfloat16 > MARGIN * rates.float32 else FLOAT32


def _known_rates(config: LoopConfig, model: PreTrainedModel | PeftModel, record: Path) -> Rates:
    shapes = multiplied_shapes(model)
    if not shapes:  # nothing to time
        return Rates(float32=1.0, bfloat16=1.0)
    tokens = min(TOKENS, config.sequence_length * config.per_device_batch_size)
    cached = _cache_file(shapes, tokens, trained=not isinstance(model, PeftModel))
    rates = _read(record) or _read(cached)
    if rates is None:
        rates = measure_rates(model, shapes, tokens)
        with contextlib.suppress(OSError):  # a home that cannot be written: the run's own record remains
            cached.parent.mkdir(parents=True, exist_ok=True)
            replace_text(cached, canonical(asdict(rates)) + "\n")
    record.parent.mkdir(parents=True, exist_ok=True)
    replace_text(record, canonical(asdict(rates)) + "\n")
    return rates


def multiplied_shapes(model: PreTrainedModel | PeftModel) -> Shapes:
    """Return the shapes of the layers' matrices, without embeddings, output projection and adapters."""
    causal = causal_model(model)
    ends = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    left_out = {id(end.weight) for end in ends if end is not None}
    trained = not isinstance(model, PeftModel)
    found = Counter(
        (each.shape[-2], each.shape[-1])
        for each in causal.parameters()
        if each.ndim >= 2 and each.requires_grad == trained and id(each) not in left_out
    )
    return dict(sorted(found.items()))


def measure_rates(model: PreTrainedModel | PeftModel, shapes: Shapes, tokens: int) -> Rates:
    """Time products of the given shapes with at most ``tokens`` tokens, forward and backward as ``model`` has them."""
    per_token = _passes(model) * sum(2 * rows * columns for rows, columns in shapes)
    tokens = min(tokens, max(FEWEST, int(OPERATIONS / per_token)))
    operations = 0.0
    seconds = dict.fromkeys((FLOAT32, BFLOAT16), 0.0)
    with torch.random.fork_rng(devices=()):
        for (rows, columns), count in sorted(shapes.items(), key=lambda each: each[0][0] * each[0][1]):
            operations += _passes(model) * tokens * 2 * rows * columns * count
            for dtype in seconds:
                seconds[dtype] += count * _seconds(model, (rows, columns), tokens, dtype)
            if max(seconds.values()) > HOPELESS * min(seconds.values()):
                break
    return Rates(**{dtype: round(operations / taken / 1e9, 1) for dtype, taken in seconds.items()})


def _passes(model: PreTrainedModel | PeftModel) -> int:
    """Return the products of a weight: forward, gradient of the input, and gradient of a trained weight."""
    return 2 if isinstance(model, PeftModel) else 3


def _seconds(model: PreTrainedModel | PeftModel, shape: tuple[int, int], tokens: int, dtype: str) -> float:
    """Return the median time of a layer's forward and backward pass, on weights as the training holds them.

    It is the processors' time over the number of threads, which survives other work on the machine.
    """
    rows, columns = shape
    trained = not isinstance(model, PeftModel)
    held = torch.float32 if trained else DTYPES[dtype]
    weight_RC = torch.randn(rows, columns, dtype=torch.float32).to(held).requires_grad_(trained)
    input_TC = torch.randn(tokens, columns).to(held).requires_grad_()
    wanted = [input_TC, weight_RC] if trained else [input_TC]
    times = []
    for _ in range(1 + ROUNDS):
        start = time.process_time()
        with autocasting(model, dtype):
            output_TR = torch.nn.functional.linear(input_TC, weight_RC)
        torch.autograd.grad(output_TR, wanted, torch.ones_like(output_TR))
        times.append(time.process_time() - start)
    return statistics.median(times[1:]) / torch.get_num_threads()


def _read(file: Path) -> Rates | None:
    """Return recorded rates; None when there are none that can be used."""
    with contextlib.suppress(OSError, ArtifactDamaged):
        rates = read_as(Rates, file)
        return rates if rates.float32 > 0 and rates.bfloat16 > 0 else None
    return None


def _cache_file(shapes: Shapes, tokens: int, *, trained: bool) -> Path:
    """Return the file of this machine's rates for such a model, in the user's cache; it need not exist."""
    machine = [_processor(), torch.cpu.get_capabilities(), torch.get_num_threads(), torch.__version__]
    model = [[*shape, count] for shape, count in shapes.items()]
    name = digest_of({"machine": list(map(str, machine)), "model": model, "tokens": tokens, "trained": trained})
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "posttrain" / "arithmetic" / f"{name[:32]}.json"


def _processor() -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
