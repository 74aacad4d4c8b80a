"""The memory and the disk that each stage of a plan needs, with its engine, as far as its settings tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from posttrain.config.on_policy import BLOCK, SamplingBackend
from posttrain.config.schema import Dtype, LoraSettings, Method
from posttrain.cost.architecture import find_architecture
from posttrain.cost.engines import HEADROOM, choose_engine, device_memory, gigabytes, gpus
from posttrain.cost.machines import Machine
from posttrain.cost.memory import KEPT_CHECKPOINTS, WHOLE, Memory, Training, checkpoint_bytes, training_memory
from posttrain.plan import Plan, Step

SMALLER = {"full": "variant=lora or variant=qlora, or ", "lora": "variant=qlora, or ", "qlora": ""}
"""Variants with fewer bytes of weights, moments and copies than each, for a message."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The needs of one stage."""

    engine: str
    reason: str
    """One clause, why this engine."""
    processes: int
    memory: Memory
    device: int | None
    """Bytes of a device; None when they are not known."""
    checkpoint: int
    """Bytes of one checkpoint."""
    host: int
    """Bytes of a machine's own memory, beside its GPUs, for the copy of a checkpoint in writing; 0 without GPUs."""
    packed: bool
    """True when rows are filled up to the sequence length; else their tokens are fewer, and the memory is a bound."""
    method: str
    """The trained weights: full, lora or qlora."""

    def memory_lines(self) -> Iterator[str]:
        """Yield the memory of a device, part by part, and a warning when it does not fit."""
        parts = {name: size for name, size in asdict(self.memory).items() if size}
        each = f"{gigabytes(self.memory.total)} on each of {self.processes} devices"
        where = each if self.processes > 1 else gigabytes(self.memory.total)
        if not self.packed:
            where = f"at most {where}, if every record is as long as sequence_length,"
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
        yield f"{where} with engine {self.engine} ({self.reason}): {listed}"
        if self.host:
            yield f"{gigabytes(self.host)} of the machine's own while a checkpoint is written in the background"
        if self.packed and self.device is not None and self.memory.total > HEADROOM * self.device:
            largest = max(parts, key=lambda name: parts[name])
            fix = {
                "activations": "gradient_checkpointing=true, fewer rows in a batch or a shorter sequence_length",
                "logits": "a smaller loss_chunk",
                "writing": "fewer answers at once (a smaller k, fewer questions a step) or a shorter sequence_length",
            }.get(largest, f"{SMALLER[self.method]}engine=fsdp on more devices")
            yield f"warning: a device has {gigabytes(self.device)}; the largest part is {largest}: try {fix}"

    def disk_line(self) -> str:
        """Return the disk of the checkpoints."""
        kept, saving = KEPT_CHECKPOINTS * self.checkpoint, (KEPT_CHECKPOINTS + 1) * self.checkpoint
        sizes = f"{gigabytes(self.checkpoint)} each, {gigabytes(kept)} for the {KEPT_CHECKPOINTS} that are kept"
        return f"checkpoints: {sizes}, {gigabytes(saving)} while one is saved"


def stage_needs(
    plan: Plan, engine: str, processes: int, per_node: int, machine: Machine | None = None
) -> dict[str, Needs]:
    """Return the needs of each stage by name, as far as its settings and the sizes of its model tell them.

    ``engine`` is the setting, ``per_node`` the processes that share a machine; ``machine`` has the devices, by default
    those of this one.
    """
    model = find_architecture(plan.model.path)
    if model is None:
        return {}
    found = {}
    on_gpus = bool(gpus()) if machine is None else machine.is_gpu
    device = device_memory(per_node) if machine is None else machine.memory
    for step, training in trainings(plan, on_gpus=on_gpus):
        checkpoint = checkpoint_bytes(model, training)
        whole = training_memory(model, training, "ddp", processes)
        # without a GPU, a copy lies in the memory in which it trains
        # and answers are written with whole weights under every engine
        needed = whole.total - whole.writing
        chosen, reason = choose_engine(engine, processes, needed + (0 if on_gpus else checkpoint), device)
        copies = 1 if chosen in WHOLE else processes  # process 0 alone writes what is whole
        memory = training_memory(model, training, chosen, processes)
        found[step.name] = Needs(
            engine=chosen,
            reason=reason,
            processes=processes,
            memory=memory if on_gpus else replace(memory, copy=checkpoint // copies),
            device=device,
            checkpoint=checkpoint,
            host=checkpoint // copies * min(copies, per_node) if on_gpus else 0,
            packed=step.stage.records in ("conversations", "documents"),
            method=training.method.value,
        )
    return found


def trainings(plan: Plan, *, on_gpus: bool) -> Iterator[tuple[Step, Training]]:
    """Yield each stage with the sizes of its training; stages whose settings have none are left out."""
    former = None
    for step in plan.steps:
        if (training := training_of(step, plan.model.dtype, former, on_gpus=on_gpus)) is not None:
            former = training
            yield step, training


def training_of(step: Step, stored: Dtype, former: Training | None, *, on_gpus: bool) -> Training | None:
    """Return the sizes of a stage's training; None where its settings have none.

    A stage without a method of its own trains the weights of ``former``, the stage before it.
    """
    config = step.config
    tokens = getattr(config, "sequence_length", None)
    method = getattr(config, "method", former and former.method)
    if not isinstance(tokens, int) or not isinstance(method, Method):
        return None
    lora = getattr(config, "lora", None)
    computed = getattr(config, "compute_dtype", None) or (stored if on_gpus else Dtype.float32)
    return Training(
        method=method,
        rank=lora.r if isinstance(lora, LoraSettings) else former.rank if former else 0,
        targets=lora.target_modules if isinstance(lora, LoraSettings) else former.targets if former else "all-linear",
        dora=lora.dora if isinstance(lora, LoraSettings) else bool(former and former.dora),
        tokens=(tokens + _answered(config)) * getattr(config, "per_device_batch_size", 1),
        sampled=step.stage.records == "questions",
        answers=_written(step),
        answer_tokens=tokens,
        copies=2 if step.stage.records == "preferences" else 1,
        checkpointing=bool(getattr(config, "gradient_checkpointing", False)),
        loss_chunk=getattr(config, "loss_chunk", tokens),
        compute_bytes=2 if computed is Dtype.bfloat16 else 4,
    )


def _written(step: Step) -> int:
    """Return the answers that the policy or the parent of a stage writes at once, at most."""
    config: Any = step.config
    if step.stage.records == "questions":
        k = getattr(config, "k", 1)
        asked = getattr(config, "per_device_batch_size", 1) * getattr(config, "gradient_accumulation", 1)
        # greedy answers to questions set aside fill a block, whatever a step asks
        aside = bool(step.eval_sources) or bool(getattr(config, "eval_share", 0))
        return max(BLOCK, k) if aside else min(asked, BLOCK // k or 1) * k
    sources = [source.on_policy for source in step.sources if source.on_policy is not None]
    own = [each.k for each in sources if each.backend is not SamplingBackend.vllm]
    return max(((BLOCK // k or 1) * k for k in own), default=0)


def _answered(config: Any) -> int:
    """Return the tokens of the answers that pass the model with a question beside the longest row."""
    return (getattr(config, "k", 1) - 1) * getattr(config, "max_tokens", 0)
