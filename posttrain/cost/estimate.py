"""The time and the money that the training of a stage takes: its tokens and steps, and a machine's speed.

    tokens      of a sample of the records, or of whole rows where the records are not on this machine
    steps       of an epoch: rows, as packing fills them, over the rows of a step
    operations  those of the loss (operations.py), and the layers that gradient_checkpointing computes again
    seconds     operations over rate times share (conf/machines.yaml), and a pause for every layer of a forward pass

Left out are loading, preparing data, evaluation, checkpoints and gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from posttrain.config.schema import Method
from posttrain.cost.architecture import Architecture
from posttrain.cost.machines import DOUBT, Machine
from posttrain.cost.memory import Training, trained_weights
from posttrain.cost.operations import Family, Operations, Work

PAUSE = {True: (1e-4, 4e-4, 1e-3), False: (3e-4, 8e-4, 2e-3)}
"""Seconds, low to high, that launching one layer takes beside its products, forward and backward, by is_gpu."""
FILLED = 0.97
"""Share of the slots in packed rows that hold a token."""
MEASURED_WITHIN = 0.15
"""Distance of a whole training's speed from that of two steps, on both sides."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A figure with its bounds."""

    low: float
    likely: float
    high: float

    def times(self, factor: float) -> Span:
        """Return the figure and its bounds, multiplied."""
        return Span(low=self.low * factor, likely=self.likely * factor, high=self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """The data of an epoch, in tokens."""

    records: int
    families: Sequence[Family]
    """Tokens of a sample of the records."""
    scored: int
    """Tokens of the sample that the loss scores."""
    within: float
    """Largest distance of the real number of tokens from this one, as a share."""
    bound: bool = False
    """True when the tokens are the most that the settings allow, because the records are not on this machine."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The settings of a stage that its number of steps depends on."""

    rows: int
    """Rows, pairs or questions of an optimizer step, of all devices together."""
    sequence_length: int
    epochs: int
    max_steps: int | None
    packed: bool
    """True when a row holds several records."""
    answers: int = 0
    """Answers that are sampled to each question."""
    answer_tokens: int = 0
    """Tokens of the longest of them."""
    referenced: bool = False
    """True when the model before training passes the data, too."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The training of one stage."""

    steps: Span
    tokens: Span
    """Tokens of all steps."""
    bound: bool
    """True when tokens, and all that follows from them, are upper bounds."""
    seconds: Span | None = None
    """None where the speed of the machine is not known."""
    source: str = ""
    """The origin of the speed, for people."""


def estimate(
    model: Architecture, training: Training, pace: Pace, volume: Volume, machine: Machine, speed: Span | None = None
) -> Estimate:
    """Return the estimate of one stage; ``speed`` is operations a second, where two steps were measured."""
    steps, records = _steps(pace, volume)
    sampled = len(volume.families)
    families = [(min(prompt, pace.sequence_length), _cut(prompt, answers, pace)) for prompt, answers in volume.families]
    each = sum(prompt + sum(answers) for prompt, answers in families) / sampled
    far = 0.0 if volume.bound else volume.within
    trained = records * each
    tokens = Span(low=trained * (1 - far), likely=trained, high=trained * (1 + far))
    about = _about(steps, 0.0 if pace.max_steps or not pace.packed else far)
    found = Estimate(steps=about, tokens=tokens, bound=volume.bound)
    operations = _operations(model, training, pace, families, volume.scored) * records / sampled
    rate = speed or _rate(training, machine)
    if rate is None:
        return found
    generated = _generation(model, training, pace, machine, records)
    passes = steps * pace.rows * pace.sequence_length / training.tokens / machine.count
    layers = model.layers * passes * (4 if training.checkpointing else 3) / 3
    pause = [0.0 if speed else each * layers for each in PAUSE[machine.is_gpu]]
    seconds = Span(
        low=operations * (1 - far) / rate.high + pause[0] + generated.low,
        likely=operations / rate.likely + pause[1] + generated.likely,
        high=operations * (1 + far) / rate.low + pause[2] + generated.high,
    )
    source = "as two steps here took" if speed else machine.source
    return replace(found, seconds=seconds, source=source)


def _steps(pace: Pace, volume: Volume) -> tuple[int, float]:
    """Return the optimizer steps, and the records that pass in them."""
    rows = float(volume.records)
    if pace.packed:
        mean = sum(min(prompt + sum(answers), pace.sequence_length) for prompt, answers in volume.families)
        rows = max(1.0, volume.records * mean / len(volume.families) / (pace.sequence_length * FILLED))
    whole = max(1, ceil(rows / pace.rows)) * pace.epochs
    if pace.max_steps is None or whole <= pace.max_steps:
        return whole, float(volume.records * pace.epochs)
    return pace.max_steps, volume.records * pace.max_steps * pace.rows / rows


def _cut(prompt: int, answers: Sequence[int], pace: Pace) -> Sequence[int]:
    if pace.answers:
        return [pace.answer_tokens // 2] * pace.answers
    return [min(answer, max(0, pace.sequence_length - prompt)) for answer in answers]


def _about(steps: int, far: float) -> Span:
    return Span(low=max(1, round(steps * (1 - far))), likely=steps, high=round(steps * (1 + far)))


def _operations(model: Architecture, training: Training, pace: Pace, families: Sequence[Family], scored: int) -> float:
    """Return the operations that the sample asks of the devices, layers that are computed again among them."""
    adapter = None
    if training.method is not Method.full:  # of experts, a token passes those alone that it is sent to
        routed = model.active / sum(map(prod, model.matrices.values()))
        adapter = round(trained_weights(model, training) * routed)
    of = Operations(model=model, adapter=adapter)
    scored = sum(sum(answers) for _, answers in families) if pace.answers else scored
    work = Work(families=families, scored=scored)
    works = [work]
    if training.checkpointing:
        works.append(replace(work, graph=False, scored=0))
    if pace.referenced:
        works.append(replace(work, graph=False))
    return float(of.of(works))


def _rate(training: Training, machine: Machine) -> Span | None:
    """Return the operations a second of all devices; None where they are not known."""
    kind = "bfloat16" if training.compute_bytes == 2 else "float32"
    if machine.rates is None or machine.shares is None or kind not in machine.rates:
        return None
    low, likely, high = machine.shares[training.method.value]
    doubt = 1.0 if machine.measured else DOUBT
    return Span(low=low / doubt, likely=likely, high=high * doubt).times(machine.rates[kind] * machine.count)


def _generation(model: Architecture, training: Training, pace: Pace, machine: Machine, records: float) -> Span:
    """Return the seconds in which the answers are drawn: each token of a batch reads the weights once."""
    if not pace.answers:
        return Span(low=0.0, likely=0.0, high=0.0)
    batches = ceil(records * 1.0 / max(1, pace.rows)) * max(1, ceil(pace.rows * pace.answers / 256))
    read = model.active * training.compute_bytes / machine.bandwidth if machine.bandwidth else 0.0
    pauses = PAUSE[machine.is_gpu]
    each = [read * factor + model.layers * pause for factor, pause in zip((1, 1.5, 3), pauses, strict=True)]
    tokens = (pace.answer_tokens / 2, pace.answer_tokens * 0.75, pace.answer_tokens)
    low, likely, high = (batches * count * seconds for count, seconds in zip(tokens, each, strict=True))
    return Span(low=low, likely=likely, high=high)


def measured_speed(
    model: Architecture, training: Training, pace: Pace, volume: Volume, tokens: float, seconds: float
) -> Span:
    """Return the operations a second of steps with so many tokens, with the distance of a training from it."""
    sampled = sum(prompt + sum(_cut(prompt, answers, pace)) for prompt, answers in volume.families)
    speed = _operations(model, training, pace, volume.families, volume.scored) * tokens / sampled / seconds
    return Span(low=speed * (1 - MEASURED_WITHIN), likely=speed, high=speed * (1 + MEASURED_WITHIN))


def duration(seconds: float) -> str:
    """Return a time for people, of two digits."""
    for name, length in (("days", 172_800.0), ("hours", 7_200.0), ("minutes", 120.0)):
        if seconds >= length:
            return f"{_two_digits(seconds / {'days': 86_400, 'hours': 3_600, 'minutes': 60}[name])} {name}"
    return f"{_two_digits(seconds)} seconds"


def _two_digits(number: float) -> str:
    rounded = f"{number:.2g}"
    return f"{float(rounded):,.0f}" if number >= 10 else rounded


def lines(found: Estimate, devices: int, price: float | None, unit: str) -> Iterator[str]:
    """Yield tokens with steps, and time with cost, each with its interval; ``price`` is that of one device's hour."""
    most = "at most " if found.bound else ""
    steps, tokens = found.steps, found.tokens
    count = f"{steps.likely:,.0f}" if steps.low == steps.high else f"{steps.low:,.0f} to {steps.high:,.0f}"
    yield f"{most}{count} steps, {most}{_short(tokens.likely)} tokens"
    if found.seconds is None:
        return
    low, likely, high = (duration(each) for each in (found.seconds.low, found.seconds.likely, found.seconds.high))
    text = f"{most}{likely} of training ({low} to {high})"
    if price is not None:
        cost = found.seconds.times(price * devices / 3600)
        text += f", {most}{cost.likely:,.2f} {unit} ({cost.low:,.2f} to {cost.high:,.2f})"
    yield f"{text}; {found.source}; loading, data, checkpoints and gates come on top"


def _short(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
