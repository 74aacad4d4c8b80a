"""The memory of each device in training, part by part, and the disk of the checkpoints.

The parts are those of the loop: weights and moments as engine/optimizer.py and engine/precision.py hold them, the
activations that attention.py and fused.py keep for the backward pass, logits in chunks as in loss.py. Left out are what
the libraries take for themselves and what an allocator loses: see ``HEADROOM`` in engines.py.
"""

# T = tokens of a micro-batch, D = width, V = vocabulary, W = processes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from posttrain.config.schema import Method
from posttrain.cost.architecture import Architecture

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits, with a byte per 64 weights and a float32 per 256 of those (arXiv:2305.14314)."""
FLOAT = 4
"""Bytes of float32: of trained weights, their gradients and AdamW's two moments."""
MOMENTS = 2
KEPT_CHECKPOINTS = 2
"""Checkpoints of a run that are kept; one more exists while it is written."""
GATHERED_LAYERS = 2
"""Layers whole at once under fsdp: the one in work and the one fetched ahead."""
BUCKET = 50_000_000
"""Numbers of gradients that deepspeed sums over the processes at once."""
DRAWN = 36
"""Bytes of a logit while a token is drawn by it: it and its log-probability in float32, its chance and their sum in
float64, and what its entropy takes."""
WHOLE = ("single", "ddp")
"""Engines that hold every weight on every device."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of a training that its memory depends on."""

    method: Method
    rank: int = 0
    """Rank of the adapter; without a meaning for full fine-tuning."""
    targets: str | Sequence[str] = "all-linear"
    dora: bool = False
    tokens: int
    """Tokens of a micro-batch."""
    copies: int = 1
    """Micro-batches' worth of tokens in one forward pass: 2 for pairs of answers."""
    sampled: bool = False
    """True when the policy writes the answers that it learns from."""
    answers: int = 0
    """Answers that this process writes at once, the policy's or its parent's, at most."""
    answer_tokens: int = 0
    """Tokens of each with its prompt, at most."""
    checkpointing: bool
    """True when activations are computed again in the backward pass."""
    loss_chunk: int
    compute_bytes: int
    """Bytes of a number of the arithmetic: 2 for bfloat16, 4 for float32."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    weights: int
    gradients: int
    moments: int
    """AdamW's averages."""
    activations: int
    """Those kept for the backward pass, and the passing ones of a layer."""
    logits: int
    """A chunk of logits, with what the loss keeps."""
    gathered: int = 0
    """Weights and gradients that are whole for a while, and copies for sending."""
    loading: int = 0
    """More than all of that: a model in 4 bits, which each process quantises whole before it is sliced."""
    writing: int = 0
    """More than all of that: the cache of answers that are written and their logits, beside weights and moments; of a
    policy in slices, the whole weights, too."""
    copy: int = 0
    """Copy of a checkpoint that is written in the background, where the device is the CPU."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())


def trained_weights(model: Architecture, training: Training) -> int:
    """Return the number of trained weights."""
    if training.method is Method.full:
        return model.total
    return model.adapter(training.rank, training.targets, dora=training.dora)


def checkpoint_bytes(model: Architecture, training: Training) -> int:
    """Return the bytes of one checkpoint: trained weights and AdamW's two moments, all in float32."""
    return trained_weights(model, training) * FLOAT * (1 + MOMENTS)


def training_memory(model: Architecture, training: Training, engine: str, processes: int = 1) -> Memory:
    """Return the memory of each of ``processes`` devices under ``engine``, its name."""
    trained = trained_weights(model, training)
    frozen = _frozen_bytes(model, training)
    share = 1 if engine in WHOLE else processes
    # fsdp sums an adapter's gradients over the processes once a step, so until then they are whole
    gradients = trained if training.method is not Method.full and engine != "deepspeed" else trained // share
    tokens = training.tokens * training.copies
    memory = Memory(
        weights=(frozen + trained * FLOAT) // share + _casts(model, training) // share,
        gradients=gradients * FLOAT,
        moments=trained * FLOAT * MOMENTS // share,
        activations=tokens * _activation_bytes(model, training),
        logits=_logit_bytes(model, training, tokens),
        gathered=_gathered_bytes(model, training, engine, processes),
    )
    whole = frozen if training.method is Method.qlora else 0  # other weights lie in their files until they are sliced
    memory = replace(memory, loading=max(0, whole - memory.total))
    written = _held_bytes(model, training, memory, whole=share == 1) + _cache_bytes(model, training)
    return replace(memory, writing=max(0, written - memory.total)) if training.sampled or training.answers else memory


def _held_bytes(model: Architecture, training: Training, memory: Memory, *, whole: bool) -> int:
    """Return the bytes of the model that writes answers: no activations, gradients and logits of training by then."""
    if not training.sampled:  # the parent, before anything is made ready for training
        return _frozen_bytes(model, training) or model.total * training.compute_bytes
    gathered = 0 if whole else _frozen_bytes(model, training) + trained_weights(model, training) * FLOAT
    return memory.weights + memory.moments + gathered


def _cache_bytes(model: Architecture, training: Training) -> int:
    """Return the bytes of what is kept of all answers, that of one layer twice while it grows, and of their logits."""
    kept = training.answers * model.cache(training.answer_tokens) * training.compute_bytes
    return kept + kept // model.layers + training.answers * model.vocabulary * DRAWN


def _frozen_bytes(model: Architecture, training: Training) -> int:
    if training.method is Method.full:
        return 0
    if training.method is Method.qlora:
        other = model.total - model.quantisable
        return int(model.quantisable * NF4_BYTES) + other * training.compute_bytes
    return model.total * training.compute_bytes


def _casts(model: Architecture, training: Training) -> int:
    """Return the bytes of the copies in bfloat16 that autocast makes of trained weights."""
    return model.total * 2 if training.method is Method.full and training.compute_bytes == 2 else 0


def _activation_bytes(model: Architecture, training: Training) -> int:
    """Return the bytes per token: all layers' kept tensors, or their inputs and one layer's, with passing gradients."""
    size = training.compute_bytes
    # input, first norm, residual, second norm; queries, attended and its copy in rows; keys and values
    mixer = 4 * model.width + 3 * model.queries + 2 * model.keys
    mlp = (4 if model.gated else 2) * model.inner
    adapter = 7 * training.rank if training.method is not Method.full else 0
    kept = mixer + mlp + adapter
    passing = 2 * model.inner + 2 * model.width
    layers = model.width * model.layers + kept if training.checkpointing else kept * model.layers
    return size * (layers + passing + 2 * model.width)


def _logit_bytes(model: Architecture, training: Training, tokens: int) -> int:
    """Return the bytes of one chunk [C, V] in the arithmetic and in float32, and of the loss's own gradients."""
    size = training.compute_bytes
    chunk = min(training.loss_chunk, tokens) * model.vocabulary
    precise = 0 if size == FLOAT else chunk * FLOAT
    hidden = 2 * tokens * model.width * size
    weight = 0
    if training.method is Method.full:  # the gradient of the projection, and the product that is added to it
        weight = model.vocabulary * model.width * (FLOAT + size)
    return chunk * size + precise + hidden + weight


def _gathered_bytes(model: Architecture, training: Training, engine: str, processes: int) -> int:
    trained = trained_weights(model, training)
    if engine == "single" or processes == 1:
        return 0
    if engine == "ddp":  # buckets of gradients on their way
        return trained * FLOAT
    size = FLOAT if training.method is Method.full else training.compute_bytes
    layer = model.per_layer * size
    if training.method is Method.qlora:
        layer = int(model.quantisable * NF4_BYTES) // model.layers
    if engine == "deepspeed":  # gradients that wait until BUCKET are there, and their copy in the order of slices
        return model.ends * size + layer + 2 * min(trained, BUCKET) * FLOAT
    gradient = (model.ends + model.per_layer) * FLOAT if training.method is Method.full else 0
    return model.ends * size + GATHERED_LAYERS * layer + gradient
