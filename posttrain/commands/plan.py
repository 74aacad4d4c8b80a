"""``posttrain plan``: the stages, settings and gates of a recipe, checked as far as can be without loading a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.commands.estimate import estimate_lines, estimates, machine_line, machine_of, pace_of, volume_of
from posttrain.config.compose import compose
from posttrain.config.launch import LaunchConfig
from posttrain.config.money import HOURS, Amount
from posttrain.config.on_policy import SamplingBackend
from posttrain.config.schema import ROOT, Backend, GateConfig, GateTask, Method, Sequential
from posttrain.cost.estimate import Estimate
from posttrain.cost.fit import fit
from posttrain.cost.machines import Machine
from posttrain.cost.needs import Needs
from posttrain.data.mixing import count_records
from posttrain.errors import BadInput, nearest, reject, suggest
from posttrain.gate.reasons import weaknesses
from posttrain.gate.roles import RULES
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.launch.shape import BLOCKS, needs_of, shape_of
from posttrain.model.base import hub_note, stored_kinds
from posttrain.plan import Plan, Step, make_plan
from posttrain.quoting import one_line
from posttrain.rewards.scorer import read_choice
from posttrain.scoring.outlook import DISCORDANCES, Outlook
from posttrain.scoring.outlook import outlooks as gate_outlooks

EXPERTS = "experts"
ON = "on="
"""Word with the GPUs that a plan is for, in place of this machine."""
FIT = "fit="
"""Word with the devices that the settings are to fit into."""
MEASURE = "--measure"
"""Flag that takes two steps of the first stage, for the speed of this machine."""
FLAGS = ("--json", MEASURE)
Kinds = Mapping[str, Mapping[str, int]]
"""Weights of the stored matrices by kind and name."""


def main(words: list[str]) -> int:
    """Print the plan, as text or as JSON."""
    host = plugins.load()
    on, size = (next((word.removeprefix(key) for word in words if word.startswith(key)), None) for key in (ON, FIT))
    if on is not None and size is not None:
        reject(f"{FIT}{size}", f"names the devices, and so does {ON}{on}", f"Leave out {ON}{on}")
    asked = [word for word in words if word not in FLAGS and not word.startswith((ON, FIT))]
    key, on = (ON, on) if size is None else (FIT, size)
    _check_near(asked, host)
    composition = compose(host, asked)
    plan = make_plan(composition, host)
    machine = machine_of(plan, on, key)
    fitting = [] if size is None else _fitting(plan, machine)
    if size is not None and (more := fit(plan, machine).words):  # what follows is the plan with the proposal
        composition = compose(host, [*asked, *more])
        plan = make_plan(composition, host)
    expected = estimates(plan, machine, _measured(plan, host, on) if MEASURE in words else None)
    needs = needs_of(plan, None if on is None else machine)
    if "--json" in words:
        print(json.dumps(_plan_json(plan, needs, expected), indent=2))
    else:
        from posttrain.run.prepared import remaining  # with the ledger and the display: a typo does not wait for them

        rows = {step.name: remaining(plan, host, step) for step in plan.steps}
        lines = [*fitting, *_text(plan, composition.config, needs, machine, expected, rows)]
        print("\n".join(map(one_line, lines)))
    return 0


def _check_near(words: Sequence[str], host: Host) -> None:
    """Raise BadInput for a misspelt word of this command: in a recipe, whose keys are known, it would mean nothing."""
    for word in words:
        key, _, value = word.partition("=")
        close = nearest(f"{key}=", (ON, FIT), cutoff=0.75) if value else None
        if close and key not in (*ROOT, *host.stages, *host.own_nodes()):
            reject(word, f"{key!r} is no key", f"Did you mean {close}{value}? posttrain plan --help explains it")


def _fitting(plan: Plan, machine: Machine) -> list[str]:
    """Return the lines with the settings that fit into the machine, or with the reason why none do."""
    found = fit(plan, machine)
    if found.reason:
        return [f"fit    nothing does: {found.reason}", ""]
    devices = [f"launch=local launch.processes={machine.count}"] if machine.count > 1 else []
    words = " ".join([*devices, *found.words])
    return [f"fit    {words or 'everything does, as it is'}", ""]


def _measured(plan: Plan, host: Host, on: str | None) -> tuple[float, float]:
    """Return the tokens and the seconds of a step taken here. Raises BadInput for another machine or unknown data."""
    from posttrain.commands.measure import measure  # loads torch, which no other plan needs

    if on is not None:
        reject(f"{ON}{on}", "--measure takes its steps on this machine", "Leave out one of the two")
    first = plan.steps[0]
    pace = pace_of(first)
    volume = None if pace is None else volume_of(first, pace, plan.model.path)
    if pace is None or volume is None:
        reject("--measure", f"{first.name} has no steps that can be counted before it runs", "Leave out --measure")
    with redirect_stdout(sys.stderr):  # what libraries print
        return measure(plan, host, pace, volume)


def _plan_json(plan: Plan, needs: Mapping[str, Needs], expected: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return the plan for scripts: the stages in running order and the resolved recipe."""
    stored = _stored(plan)
    stages = [
        {
            "name": step.name,
            "kind": step.stage.name,
            "parent": step.stage.parent,
            "plugin": step.origin,
            "data": [source.path for source in step.sources],
            "gate": sorted(step.tasks),
            "power": _power_json(step),
            "notes": weaknesses(step.gate, step.tasks),
            "advice": _advice(step, stored),
            "needs": asdict(needs[step.name]) if step.name in needs else None,
            "estimate": asdict(expected[step.name]) if step.name in expected else None,
        }
        for step in plan.steps
    ]
    return {"recipe": plan.recipe, "stages": stages, "config": plan.resolved}


def _power_json(step: Step) -> dict[str, Any]:
    """Return documents and chances to pass of every task, by assumed discordance; empty where the gate is off."""
    found = gate_outlooks(step.gate, step.tasks) if step.gate.enabled else []
    return {each.name: {"documents": each.documents, "chances": each.chances} for each in found}


def _text(
    plan: Plan,
    config: DictConfig,
    needs: Mapping[str, Needs],
    machine: Machine,
    expected: Mapping[str, Estimate],
    rows: Mapping[str, str],
) -> list[str]:
    order = " ─► ".join(step.name for step in plan.steps)
    model = [plan.model.path, plan.model.dtype.value, f"seed {plan.seed}"]
    stored, times = _stored(plan), estimate_lines(plan, machine, expected)
    if (note := hub_note(plan.model.path)) is not None:
        model.append(note)
    lines = [f"{plan.recipe}: {order}", *plan.shadows, f"model  {', '.join(model)}", *_weights(stored)]
    lines.append(f"on     {machine_line(machine)}")
    from posttrain.run.start import read_base

    lines += [*(f"warning  stands on what no gate passed: {each}" for each in read_base(plan)), ""]
    if plan.spend_cap is not None:
        lines[-1:] = [_cap(plan), ""]
    for step in plan.steps:
        lines += [f"{step.name}  {step.stage.summary}  [{step.origin}]"]
        lines += [f"  data   {source.path}{_source_note(source)}" for source in step.own_sources]
        lines += [*_replay(step), f"  rows   {rows[step.name]}"]
        lines += [f"  {line}" for line in _changed(step.name, step.config, type(step.config)(), config)]
        lines += [f"  reach  {line}" for line in _reach(step, stored)]
        if need := needs.get(step.name):
            lines += [*(f"  memory {line}" for line in need.memory_lines()), f"  disk   {need.disk_line()}"]
        lines += [f"  time   {line}" for line in times.get(step.name, ())]
        lines += [f"  gate   {line}" for line in _gate(step, plan.launch)]
        lines += [f"  advice {line}" for line in _advice(step, stored)]
        lines += [""]
    return lines[:-1]


def _cap(plan: Plan) -> str:
    """Return the line about the spend cap."""
    cap, price, world = plan.spend_cap, plan.price_per_hour, shape_of(plan.launch).world
    what = f"spend  at most {cap}: the run stops before that with a checkpoint and exit code 75"
    if cap is None or cap.is_time:
        return what
    if price is None:
        return f"{what}; at the price that conf/prices.yaml has for the device, or price_per_hour=2.50 {cap.unit}"
    return f"{what}, after {Amount(value=cap.value / price.value / world, unit=HOURS)} at {price} an hour a device"


def _advice(step: Step, stored: Kinds) -> list[str]:
    lines = [f"{step.name}.{line}" for line in step.config.advice(count_records(step.sources))]
    experts = sum(stored.get(EXPERTS, {}).values())
    if experts and _method(step) is Method.qlora:
        share = experts / _total(stored)
        fused = "where the architecture fuses them, they stay in 16 bits: bitsandbytes quantises linear layers alone"
        lines.append(f"{step.name}.method: {share:.1%} of the weights are experts; {fused}")
    return lines


def _stored(plan: Plan) -> Kinds:
    """Return the weights of a model in a local folder, by kind and name; nothing for others and damaged ones."""
    folder = Path(plan.model.path).expanduser()
    try:
        return stored_kinds(folder) if folder.is_dir() else {}
    except BadInput:  # a run says what is wrong with it
        return {}


def _weights(stored: Kinds) -> list[str]:
    total = _total(stored)
    shares = [f"{kind} {sum(weights.values()) / total:.1%}" for kind, weights in sorted(stored.items())]
    return [f"weights  {total:,} in matrices: {', '.join(shares)}"] if total else []


def _reach(step: Step, stored: Kinds) -> list[str]:
    """Return the share of the weights under the adapter of a stage that has settings for one."""
    targets = getattr(getattr(step.config, "lora", None), "target_modules", None)
    if targets is None or not stored or _method(step) is Method.full:
        return []
    kinds = {kind: stored[kind] for kind in ("linear layers", EXPERTS) if kind in stored}
    if isinstance(targets, str):
        reached, what = sum(map(_size, kinds.values())), f"{targets}: {' and '.join(kinds)}"
    else:
        ends = tuple(f".{target}{end}" for target in targets for end in ("", ".weight"))
        weights = [size for kind in kinds.values() for name, size in kind.items() if f".{name}".endswith(ends)]
        reached, what = sum(weights), f"{', '.join(targets)}: {len(weights):,} matrices"
    line = f"{what}, {reached / _total(stored):.1%} of the weights"
    return [line, *(() if isinstance(targets, str) or reached else _unknown_targets(targets, kinds))]


def _unknown_targets(targets: Sequence[str], kinds: Kinds) -> list[str]:
    """Return a warning about targets of which none is the name of a stored matrix: training would reject them."""
    names = {name.removesuffix(".weight").rpartition(".")[2] for kind in kinds.values() for name in kind}
    return [f"warning: no matrix is stored by the name {each}. {suggest(each, names)}" for each in targets]


def _method(step: Step) -> Method | None:
    found = getattr(step.config, "method", None)
    return found if isinstance(found, Method) else None


def _size(weights: Mapping[str, int]) -> int:
    return sum(weights.values())


def _total(stored: Kinds) -> int:
    return sum(map(_size, stored.values()))


def _replay(step: Step) -> list[str]:
    """Return the line about the replayed source, if there is one."""
    if step.replay is None:
        return []
    source, auto = step.sources[-1], step.replay.auto
    if auto is None:
        return [f"  replay {source.path}{_source_note(source)}"]
    shares = ", ".join(f"{share:.1%}" for share in auto.shares())
    search = f"the first at which the guards hold on half of their documents, in {auto.attempts} trainings at most"
    return [f"  replay {source.path}  ({shares} of the tokens: {search})"]


def _source_note(source: Any) -> str:
    notes = [f"weight {source.weight:g}"] if source.weight != 1 else []
    notes += [f"{source.share:.1%} of the tokens"] if source.share is not None else []
    notes += [f"the first {source.limit:,}"] if source.limit else []
    if (asked := source.on_policy) is not None:
        rewards = " and ".join(read_choice(asked.reward))
        by = " by vLLM" if asked.backend is SamplingBackend.vllm else ""
        notes.append(f"asked of the parent{by}, {asked.k} answers each, kept as {asked.keep.value} by {rewards}")
    return f"  ({', '.join(notes)})" if notes else ""


def _changed(path: str, settings: Any, defaults: Any, config: DictConfig) -> list[str]:
    """Return the settings that differ from their defaults, each with the key it takes its value from."""
    lines = []
    for field in fields(settings):
        value, default = getattr(settings, field.name), getattr(defaults, field.name)
        if field.name in ("kind", "data", "replay", "gate"):
            continue
        if is_dataclass(value):
            lines += _changed(f"{path}.{field.name}", value, default, config)
        elif value != default:
            raw = OmegaConf.select(config, path)._get_node(field.name)._value()
            origin = f"  # {raw}" if isinstance(raw, str) and raw.startswith("${") else ""
            lines.append(f"{path}.{field.name}: {value.value if isinstance(value, Enum) else value}{origin}")
    return lines


def _gate(step: Step, launch: LaunchConfig) -> list[str]:
    gate = step.gate
    if not gate.enabled:
        return ["none: the artifact is promoted unseen", *(f"warning: {each}" for each in weaknesses(gate, {}))]
    policy = f"on fail {gate.on_fail.value}, on undecided {gate.on_undecided.value}"
    head = f"against {' and '.join(gate.against)} at {gate.confidence:.0%} confidence, {policy}"
    if gate.sequential is not Sequential.none:
        head += f", decided at the first of {gate.looks} looks that can"
    outlooks = gate_outlooks(gate, step.tasks)
    asked = [*step.tasks, *(outlook.name for outlook in outlooks[len(step.tasks) :])]
    lines = [_asked(gate, name, step.tasks.get(name), each) for name, each in zip(asked, outlooks, strict=True)]
    if any(each.chances for each in outlooks):
        shares = " or ".join(f"{share:.0%}" for share in DISCORDANCES)
        lines.append(f"power assuming the two systems disagree on {shares} of the documents")
    lines += [f"warning: {_warning(each)}" for each in outlooks if each.hopeless]
    warnings = [f"warning: {weakness}" for weakness in weaknesses(gate, step.tasks)]
    return [head, *lines, *_processes(gate, shape_of(launch).world), *warnings]


def _processes(gate: GateConfig, world: int) -> list[str]:
    """Return who asks the questions, where there are several processes."""
    if world == 1:
        return []
    if gate.backend is Backend.vllm:
        return ["vLLM answers in the command's own process: the launch is for training alone"]
    fewer = f"by fewer where each would get less than {BLOCKS} blocks of {gate.batch_size} documents"
    return [f"asked by {world} processes, {fewer}"]


def _asked(gate: GateConfig, name: str, task: GateTask | None, outlook: Outlook) -> str:
    """Return the demand on a task, or on all guards together, with its documents and its chance to pass."""
    demand = name
    if task is not None:
        demand = f"{task.role.value} {name} {task.metric}: {RULES[task.role].demand(gate, task)}"
    elif gate.pooled_max_drop is not None:
        demand = f"{name}: lower bound > {-gate.pooled_max_drop:+.3f}"
    counted = "" if outlook.documents is None else f", {outlook.documents:,} documents"
    return f"{demand}{counted}; {_power(outlook)}"


def _power(outlook: Outlook) -> str:
    if not outlook.chances:
        unknown = "the spread of its scores" if outlook.documents else "the number of its documents"
        enough = f"; about {outlook.needed:,} documents would do" if outlook.needed else ""
        return f"power unknown, as {unknown} is{enough}"
    return f"{RULES[outlook.role].supposed} passes with {' or '.join(f'{chance:.0%}' for chance in outlook.chances)}"


def _warning(outlook: Outlook) -> str:
    """Return why a gate is hopeless, and what would help."""
    supposed, best = RULES[outlook.role].supposed, max(outlook.chances)
    reason = f"{outlook.name} is hopeless: {supposed} passes with {best:.0%} at best"
    if outlook.needed:
        return f"{reason}; about {outlook.needed:,} documents would do"
    return f"{reason}; more documents, a larger max_drop or pooled_max_drop would help"
