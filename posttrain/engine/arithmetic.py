"""The number format of the arithmetic: the faster one, measured once per machine and model.

Products of the model's own shapes are timed in float32 and in bfloat16. The rates of a training are recorded beside
the checkpoints, so that a resumed run computes as it began. All are kept in the user's cache, so that a machine always
computes the same. The rate of the format taken is also what a training's own rate is compared with (throughput.py).
"""

# T = tokens of a product, R = rows and C = columns of a weight

from __future__ import annotations

import contextlib
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from posttrain.artifact import ModelSource
from posttrain.cost.engines import device_memory
from posttrain.digests import canonical, digest_of
from posttrain.disk import replace_text
from posttrain.engine.attention import causal_model
from posttrain.engine.config import LoopConfig
from posttrain.engine.precision import BFLOAT16, FLOAT32, is_quantised
from posttrain.errors import ArtifactDamaged
from posttrain.model.base import stored_shapes
from posttrain.model.device import CPU, CUDA, METAL, default_device
from posttrain.model.loading import DTYPES
from posttrain.saved import read_as

MARGIN = 1.1
"""Times the rate of one format that the other must reach to take its place: a tie is noise.

A training gives up float32, which is more exact; a model that only answers gives up bfloat16, which is smaller.
"""
HOPELESS = 4.0
"""Ratio of the rates at which the smallest shapes decide: some processors multiply bfloat16 thirty times slower."""
TOKENS = {CPU: 512, CUDA: 4096, METAL: 2048}
"""Most tokens of a timed product, by kind of device: beyond them the rate hardly changes."""
FEWEST = 64
"""Fewest tokens of a timed product: below them it measures the memory."""
OPERATIONS = {CPU: 2e9, CUDA: 4e12, METAL: 2e11}
"""Operations in one round over all shapes, by kind of device, as far as FEWEST allows."""
SHORTEST = 1e-6
"""Seconds that a product takes at least: clocks of processors may stand still for products of a tiny model."""
ROUNDS = 3
"""Timed rounds after one to warm up; their median counts."""

FORMATS = (FLOAT32, BFLOAT16)

FORWARD, ADAPTED, TRAINED = 1, 2, 3
"""Products of a weight: forward, with the gradient of its input, and with its own."""
MOST_MEMORY = 0.5
"""Share of the machine's memory that weights in float32 may take where bfloat16 would do."""

Shapes = Mapping[tuple[int, int], int]
"""Number of weights by shape, (R, C)."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured rates of products, in GFLOP/s; None for a format that was not timed."""

    float32: float | None = None
    bfloat16: float | None = None

    def of(self, dtype: str) -> float:
        """Return the rate of a format; 0 when there is none."""
        return {FLOAT32: self.float32, BFLOAT16: self.bfloat16}[dtype] or 0.0


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
        other = FLOAT32 if self.dtype == BFLOAT16 else BFLOAT16
        rates = f"{self.rates.of(self.dtype):,.0f} against {self.rates.of(other):,.0f}"
        return f"{text} (measured: {rates} GFLOP/s)"


def choose_arithmetic(config: LoopConfig, stored: str, model: PreTrainedModel | PeftModel, record: Path) -> Arithmetic:
    """Return the arithmetic for ``model``, with weights stored as ``stored``; ``record`` is the run's file of rates.

    A setting decides; quantised weights and float32 keep their format, and so does CUDA. Metal computes in float32. A
    CPU takes the faster format for bfloat16 weights: as recorded, else as cached for this machine, else as measured.
    """
    dtype = stored
    if config.compute_dtype is not None and not is_quantised(model):
        dtype = config.compute_dtype.value
    elif stored == BFLOAT16 and default_device().type == METAL and not is_quantised(model):
        dtype = FLOAT32
    elif stored == BFLOAT16 and default_device().type == CPU and not is_quantised(model):
        rates = _known_rates(config, model, record)
        return Arithmetic(dtype=_faster(rates), stored=stored, rates=rates)
    return Arithmetic(dtype=dtype, stored=stored)


def choose_inference(dtype: str, source: ModelSource) -> str:
    """Return the number format of the arithmetic in which a model answers, with the weights ``source`` as ``dtype``.

    A CPU computes with bfloat16 weights in float32 where that is faster and the memory suffices. Raises BadInput for
    damaged weights.
    """
    if dtype != BFLOAT16 or source.quantization is not None or default_device().type != CPU:
        return dtype
    weights = [shape for shape in stored_shapes(source.model).values() if len(shape) >= 2]
    size, memory = 4 * sum(map(math.prod, weights)), device_memory()
    if not weights or (memory is not None and size > MOST_MEMORY * memory):
        return dtype
    shapes = dict(sorted(Counter((shape[-2], shape[-1]) for shape in weights).items()))
    rates = _machine_rates(shapes, TOKENS[CPU], FORWARD, FORMATS)
    return FLOAT32 if rates.of(FLOAT32) > MARGIN * rates.of(BFLOAT16) else dtype


def product_rate(config: LoopConfig, model: PreTrainedModel | PeftModel, arithmetic: Arithmetic) -> float:
    """Return the GFLOP/s of products of the model's own shapes in the format of ``arithmetic``, on one device.

    As it decided, else as cached for this machine, else as measured; 0 for a model that multiplies nothing.
    """
    if arithmetic.rates is not None:
        return arithmetic.rates.of(arithmetic.dtype)
    shapes = multiplied_shapes(model)
    if not shapes:
        return 0.0
    return _machine_rates(shapes, _tokens(config), _passes(model), (arithmetic.dtype,)).of(arithmetic.dtype)


def _faster(rates: Rates) -> str:
    return BFLOAT16 if rates.of(BFLOAT16) > MARGIN * rates.of(FLOAT32) else FLOAT32


def _known_rates(config: LoopConfig, model: PreTrainedModel | PeftModel, record: Path) -> Rates:
    shapes = multiplied_shapes(model)
    if not shapes:  # nothing to time
        return Rates(float32=1.0, bfloat16=1.0)
    rates = _read(record, FORMATS) or _machine_rates(shapes, _tokens(config), _passes(model), FORMATS)
    record.parent.mkdir(parents=True, exist_ok=True)
    replace_text(record, canonical(asdict(rates)) + "\n")
    return rates


def _tokens(config: LoopConfig) -> int:
    """Return the tokens of a timed product, at most those of a batch."""
    return min(TOKENS[default_device().type], config.sequence_length * config.per_device_batch_size)


def _machine_rates(shapes: Shapes, tokens: int, passes: int, formats: Sequence[str]) -> Rates:
    """Return the rates of this machine in ``formats``: as cached, else as measured."""
    cached = _cache_file(shapes, tokens, passes, formats)
    if (rates := _read(cached, formats)) is None:
        rates = measure_rates(shapes, tokens, passes, formats)
        with contextlib.suppress(OSError):  # a home that cannot be written
            cached.parent.mkdir(parents=True, exist_ok=True)
            replace_text(cached, canonical(asdict(rates)) + "\n")
    return rates


def multiplied_shapes(model: PreTrainedModel | PeftModel) -> Shapes:
    """Return the shapes of the layers' matrices, without embeddings, output projection and adapters."""
    causal = causal_model(model)
    ends = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    left_out = {id(end.weight) for end in ends if end is not None}
    trained = not isinstance(model, PeftModel)
    found = Counter(
        matrix_shape(each)[-2:]
        for each in causal.parameters()
        if each.ndim >= 2 and each.requires_grad == trained and id(each) not in left_out
    )
    return dict(sorted(found.items()))  # type: ignore[arg-type]


def matrix_shape(weight: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a weight; of one in 4 bits, which is stored as a column of bytes, the one it stands for."""
    return tuple(getattr(getattr(weight, "quant_state", None), "shape", weight.shape))


def measure_rates(shapes: Shapes, tokens: int, passes: int, formats: Sequence[str] = FORMATS) -> Rates:
    """Time products of the given shapes with at most ``tokens`` tokens, so many of each weight."""
    per_token = passes * sum(2 * rows * columns for rows, columns in shapes)
    tokens = min(tokens, max(FEWEST, int(OPERATIONS[default_device().type] / per_token)))
    operations = 0.0
    seconds = dict.fromkeys(formats, 0.0)
    for (rows, columns), count in sorted(shapes.items(), key=lambda each: each[0][0] * each[0][1]):
        operations += passes * tokens * 2 * rows * columns * count
        for dtype in seconds:
            seconds[dtype] += count * _seconds((rows, columns), tokens, passes, dtype)
        if max(seconds.values()) > HOPELESS * min(seconds.values()):
            break
    return Rates(**{dtype: round(operations / taken / 1e9, 1) for dtype, taken in seconds.items()})


def _passes(model: PreTrainedModel | PeftModel) -> int:
    return ADAPTED if isinstance(model, PeftModel) else TRAINED


def _seconds(shape: tuple[int, int], tokens: int, passes: int, dtype: str) -> float:
    """Return the median time of a layer's products, on weights as they are held."""
    rows, columns = shape
    device, trained = default_device(), passes == TRAINED
    held = torch.float32 if trained else DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)  # one of its own: those of the training stay as they are
    weight_RC = torch.randn(rows, columns, generator=generator).to(device, held).requires_grad_(trained)
    input_TC = torch.randn(tokens, columns, generator=generator).to(device, held).requires_grad_(passes != FORWARD)
    wanted = [input_TC, weight_RC][: passes - 1]
    times = []
    for _ in range(1 + ROUNDS):
        start = _clock(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=trained and dtype == BFLOAT16):
            output_TR = torch.nn.functional.linear(input_TC, weight_RC)
        if wanted:
            torch.autograd.grad(output_TR, wanted, torch.ones_like(output_TR))
        times.append(_clock(device) - start)
    return max(statistics.median(times[1:]), SHORTEST)


def _clock(device: torch.device) -> float:
    """Return the seconds of work so far: of a GPU by the clock, of a CPU by its processors.

    The processors' time over the number of threads counts no other work on the machine, whose use of the caches slows
    this all the same.
    """
    if device.type != CPU:
        torch.get_device_module(device).synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def _read(file: Path, formats: Sequence[str]) -> Rates | None:
    """Return recorded rates; None when there are none of all ``formats`` that can be used."""
    with contextlib.suppress(OSError, ArtifactDamaged):
        rates = read_as(Rates, file)
        return rates if all(rates.of(dtype) > 0 for dtype in formats) else None
    return None


def _cache_file(shapes: Shapes, tokens: int, passes: int, formats: Sequence[str]) -> Path:
    """Return the file of this machine's rates for such a model, in the user's cache; it need not exist."""
    machine = [_processor(), torch.cpu.get_capabilities(), torch.get_num_threads(), torch.__version__]
    model = [[*shape, count] for shape, count in shapes.items()]
    asked = {"formats": list(formats), "tokens": tokens, "passes": passes}
    name = digest_of({"machine": list(map(str, machine)), "model": model, **asked})
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "posttrain" / "arithmetic" / f"{name[:32]}.json"


def _processor() -> str:
    if (kind := default_device().type) != CPU:
        return torch.cuda.get_device_name() if kind == CUDA else torch.backends.mps.get_name()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
