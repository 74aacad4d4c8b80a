"""Settings with which a recipe fits into given devices: proposed in the order in which they cost least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from posttrain.config.schema import Method
from posttrain.cost.architecture import Architecture, find_architecture
from posttrain.cost.engines import HEADROOM, SINGLE, choose_engine, gigabytes
from posttrain.cost.machines import Machine
from posttrain.cost.memory import Memory, Training, training_memory
from posttrain.cost.needs import trainings
from posttrain.plan import Plan, Step

SMALLER = (Method.full, Method.lora, Method.qlora)
"""Methods, each with less memory than the one before."""
LEAST_CHUNK = 256
"""Tokens whose logits are held at once, at least: with fewer the products are too small for a device."""
SHORTEST = 128
"""Tokens of the shortest row that is worth a word."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The settings with which a recipe fits, or why none do."""

    words: tuple[str, ...] = ()
    """Words for the command line that differ from the recipe."""
    reason: str = ""
    """Why nothing fits, and what would; empty when something does."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to train a stage: its training, and the words that make it so."""

    training: Training
    words: tuple[str, ...]


def fit(plan: Plan, machine: Machine) -> Fit:
    """Return the settings with which every stage fits into the devices of ``machine``; rows are never cut shorter.

    An optimizer step keeps its rows, so that a smaller forward pass changes the speed alone; a smaller method is the
    last resort.
    """
    model = find_architecture(plan.model.path)
    known = [*trainings(plan, on_gpus=machine.is_gpu)]
    if model is None or not known or machine.memory is None:
        return Fit(reason=f"nothing is known of the memory: the sizes of {plan.model.path} are, once it is here")
    first = known[0][1].method
    methods = SMALLER[SMALLER.index(first) :]
    failure = ""
    for method in methods:
        words: list[str] = [] if method is first else [f"variant={method.value}"]
        failure = ""
        for step, training in known:
            choices = _choices(step, replace(training, method=method))
            found = next((each for each in choices if _fits(model, each, machine)), None)
            if found is None:
                failure = _why(model, step, replace(training, method=method), machine)
                break
            words += found.words
        if not failure:
            return Fit(words=tuple(words))
    return Fit(reason=failure)


def _choices(step: Step, training: Training) -> Iterator[Choice]:
    """Yield ways to train a stage, the quickest first: as it is, with layers computed again, with smaller passes."""
    yield Choice(training=training, words=())
    config: Any = step.config
    checked = replace(training, checkpointing=True)
    words: tuple[str, ...] = () if training.checkpointing else (f"{step.name}.gradient_checkpointing=true",)
    yield Choice(training=checked, words=words)
    rows, batches = getattr(config, "per_device_batch_size", 1), getattr(config, "gradient_accumulation", 1)
    sized = words
    smaller: Sequence[int] = () if getattr(config, "coupled", False) else _divisors(rows)
    for fewer in smaller:
        size = f"{step.name}.per_device_batch_size={fewer}"
        checked = replace(checked, tokens=training.tokens * fewer // rows)
        sized = (*words, size, f"{step.name}.gradient_accumulation={rows * batches // fewer}")
        yield Choice(training=checked, words=sized)
    if training.loss_chunk > LEAST_CHUNK and hasattr(config, "loss_chunk"):
        chunk = f"{step.name}.loss_chunk={LEAST_CHUNK}"
        yield Choice(training=replace(checked, loss_chunk=LEAST_CHUNK), words=(*sized, chunk))


def _divisors(rows: int) -> list[int]:
    return [each for each in range(rows - 1, 0, -1) if rows % each == 0]


def _memory(model: Architecture, training: Training, machine: Machine) -> Memory:
    """Return the memory of a device under the engine that is chosen for it."""
    whole = training_memory(model, training, "ddp", machine.count)
    engine = SINGLE
    if machine.count > 1:
        engine, _ = choose_engine("auto", machine.count, whole.total - whole.writing, machine.memory)
    return training_memory(model, training, engine, machine.count)


def _fits(model: Architecture, choice: Choice, machine: Machine) -> bool:
    return machine.memory is not None and _memory(model, choice.training, machine).total <= HEADROOM * machine.memory


def _why(model: Architecture, step: Step, training: Training, machine: Machine) -> str:
    """Return why a stage does not fit by any means, with its largest part and what would help."""
    *_, least = _choices(step, training)
    memory = _memory(model, least.training, machine)
    parts = asdict(memory)
    largest = max(parts, key=lambda name: parts[name])
    text = (
        f"{step.name} takes {gigabytes(memory.total)} at least, with variant={training.method.value}, and a device of "
        f"{gigabytes(machine.memory or 0)} has {gigabytes(HEADROOM * (machine.memory or 0))} for it; most of it is "
        f"{largest}, {gigabytes(parts[largest])}"
    )
    length, rows = getattr(step.config, "sequence_length", 0), least.training.tokens
    while length and (length := length // 2) >= SHORTEST:
        rows //= 2
        shorter = replace(least.training, tokens=rows, answer_tokens=length)
        if _fits(model, Choice(training=shorter, words=()), machine):
            return f"{text}. Rows of {length} tokens would fit: {step.name}.sequence_length={length}"
    more = "more devices, such as fit='8 x 80GB', or " if machine.count == 1 else ""
    return f"{text}. Shorter rows do not help: it takes {more}larger devices or a smaller model"
