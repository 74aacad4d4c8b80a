"""The time and the cost that ``posttrain plan`` expects of each stage, on this machine or on one that is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.money import price_of
from posttrain.cost.architecture import find_architecture
from posttrain.cost.estimate import Estimate, Pace, Volume, estimate, lines, measured_speed
from posttrain.cost.machines import Machine, named_machine, this_machine
from posttrain.cost.needs import trainings
from posttrain.data.mixing import count_records
from posttrain.data.sizes import Size, characters_per_token, read_sizes
from posttrain.environment import cores
from posttrain.launch.shape import shape_of
from posttrain.plan import Plan, Step

CHARACTERS = 4.0
"""Characters of a token in text of western languages, where no tokenizer is at hand."""
ROUGHLY, CLOSELY = 0.35, 0.15
"""Distance of the tokens of all records from those of a sample: by CHARACTERS, and by the model's tokenizer."""
FRAME = 5
"""Tokens that a chat template puts around a turn."""
UNKNOWN = "not known before the data is on this machine; limit or max_steps bounds it"


def machine_of(plan: Plan, named: str | None, key: str = "") -> Machine:
    """Return the machine that a plan is for, named after ``key``. Raises BadInput for a name without figures."""
    shape = shape_of(plan.launch)
    return this_machine(shape.world, shape.per_node) if named is None else named_machine(named, shape.world, key)


def estimates(plan: Plan, machine: Machine, measured: tuple[float, float] | None = None) -> dict[str, Estimate]:
    """Return the estimate of each stage by name, as far as its model, its data and the machine are known.

    ``measured`` is the tokens and the seconds of steps of the first stage, taken here.
    """
    model, speed = find_architecture(plan.model.path), None
    found: dict[str, Estimate] = {}
    for step, training in () if model is None else trainings(plan, on_gpus=machine.is_gpu):
        pace = pace_of(step)
        volume = None if pace is None else volume_of(step, pace, plan.model.path)
        if model is None or pace is None or volume is None:
            continue
        if measured is not None and speed is None:
            speed = measured_speed(model, training, pace, volume, *measured)
        found[step.name] = estimate(model, training, pace, volume, machine, speed)
    return found


def pace_of(step: Step) -> Pace | None:
    """Return what the number of a stage's steps depends on; None for a kind without the loop's settings."""
    config: Any = step.config
    if not hasattr(config, "gradient_accumulation") or not hasattr(config, "sequence_length"):
        return None
    return Pace(
        rows=config.per_device_batch_size * config.gradient_accumulation,
        sequence_length=config.sequence_length,
        epochs=config.epochs,
        max_steps=config.max_steps,
        packed=config.packing and step.stage.records in ("conversations", "documents"),
        answers=getattr(config, "k", 0),
        answer_tokens=getattr(config, "max_tokens", 0),
        referenced=bool(getattr(config, "referenced", False)),
    )


def volume_of(step: Step, pace: Pace, model: str) -> Volume | None:
    """Return the data of a stage's epoch; where it is elsewhere, the most that the settings allow, or None."""
    sizes = read_sizes(step.sources, step.stage.records)
    if sizes is None:
        return _most(step, pace)
    each = characters_per_token(sizes.text, model)
    within = ROUGHLY if each is None else CLOSELY
    found = [_tokens(size, each or CHARACTERS) for size in sizes.sample]
    scored = sum(round(size.trained / (each or CHARACTERS)) for size in sizes.sample)
    return Volume(records=sizes.records, families=found, scored=scored, within=within)


def _tokens(size: Size, each: float) -> tuple[int, tuple[int, ...]]:
    return round(size.shared / each) + FRAME * size.turns, tuple(round(answer / each) + 1 for answer in size.answers)


def _most(step: Step, pace: Pace) -> Volume | None:
    records = count_records(step.sources)
    if records is None:
        records = None if pace.max_steps is None else pace.max_steps * pace.rows
    if not records:
        return None
    half, pairs = pace.sequence_length // 2, step.stage.records == "preferences"
    family = (half, (half, half)) if pairs else (pace.sequence_length, ())
    return Volume(records=records, families=[family], scored=2 * half, within=0.0, bound=True)


def estimate_lines(plan: Plan, machine: Machine, found: Mapping[str, Estimate]) -> dict[str, list[str]]:
    """Return the lines about each stage by name."""
    price, unit = _price(plan, machine)
    known = find_architecture(plan.model.path) is not None
    reason = UNKNOWN if known else f"not known: the sizes of {plan.model.path} are, once it is on this machine"
    return {
        step.name: [*lines(found[step.name], machine.count, price, unit)] if step.name in found else [reason]
        for step in plan.steps
        if pace_of(step) is not None
    }


def machine_line(machine: Machine) -> str:
    """Return the machine in words, and what would make its speed known."""
    count = f"{machine.count} x " if machine.count > 1 else ""
    cores_text = f", {machine.cores} core{'s' if machine.cores > 1 else ''}" if not machine.is_gpu else ""
    if not machine.name:
        return f"{count}a device with {(machine.memory or 0) / 1e9:.0f} GB; on=H100 names one for its time and cost"
    text = f"{count}{machine.name}{cores_text}"
    if machine.rates is None:
        return f"{text}: no figures of its speed are known; --measure takes two steps here, on=H100 asks for another"
    return text


def _price(plan: Plan, machine: Machine) -> tuple[float | None, str]:
    """Return the price of an hour of one device, and its currency."""
    if plan.price_per_hour is not None:
        return plan.price_per_hour.value, plan.price_per_hour.unit
    found = price_of(machine.name if machine.is_gpu else None, machine.cores if not machine.is_gpu else cores())
    return (None, "") if found is None else (found.value, found.unit)
