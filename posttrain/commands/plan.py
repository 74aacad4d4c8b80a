"""``posttrain plan``: the stages, settings and gates of a recipe, checked as far as can be without loading a model."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain.config.compose import compose
from posttrain.config.schema import GateConfig, GateTask, Sequential
from posttrain.data.mixing import count_records
from posttrain.gate.roles import RULES
from posttrain.host import plugins
from posttrain.plan import Plan, Step, make_plan
from posttrain.quoting import one_line
from posttrain.scoring.outlook import DISCORDANCES, Outlook
from posttrain.scoring.outlook import outlooks as gate_outlooks


def main(words: list[str]) -> int:
    """Print the plan, as text or as JSON."""
    host = plugins.load()
    composition = compose(host, [word for word in words if word != "--json"])
    plan = make_plan(composition, host)
    if "--json" in words:
        print(json.dumps(_plan_json(plan), indent=2))
    else:
        print("\n".join(map(one_line, _text(plan, composition.config))))
    return 0


def _plan_json(plan: Plan) -> dict[str, Any]:
    """Return the plan for scripts: the stages in running order and the resolved recipe."""
    stages = [
        {
            "name": step.name,
            "kind": step.stage.name,
            "parent": step.stage.parent,
            "plugin": step.origin,
            "data": [source.path for source in step.sources],
            "gate": sorted(step.tasks),
            "power": _power_json(step),
            "advice": _advice(step),
        }
        for step in plan.steps
    ]
    return {"recipe": plan.recipe, "stages": stages, "config": plan.resolved}


def _power_json(step: Step) -> dict[str, Any]:
    """Return documents and chances to pass of every task, by assumed discordance; empty where the gate is off."""
    found = gate_outlooks(step.gate, step.tasks) if step.gate.enabled else []
    return {each.name: {"documents": each.documents, "chances": each.chances} for each in found}


def _text(plan: Plan, config: DictConfig) -> list[str]:
    order = " ─► ".join(step.name for step in plan.steps)
    model = [plan.model.path, plan.model.dtype.value, f"seed {plan.seed}"]
    lines = [f"{plan.recipe}: {order}", *plan.shadows, f"model  {', '.join(model)}", ""]
    for step in plan.steps:
        lines += [f"{step.name}  {step.stage.summary}  [{step.origin}]"]
        lines += [f"  data   {source.path}{_source_note(source)}" for source in step.sources]
        lines += [f"  {line}" for line in _changed(step.name, step.config, type(step.config)(), config)]
        lines += [f"  gate   {line}" for line in _gate(step)]
        lines += [f"  advice {line}" for line in _advice(step)]
        lines += [""]
    return lines[:-1]


def _advice(step: Step) -> list[str]:
    return [f"{step.name}.{line}" for line in step.config.advice(count_records(step.sources))]


def _source_note(source: Any) -> str:
    notes = [f"weight {source.weight:g}"] if source.weight != 1 else []
    notes += [f"{source.share:.1%} of the tokens"] if source.share is not None else []
    notes += [f"the first {source.limit:,}"] if source.limit else []
    return f"  ({', '.join(notes)})" if notes else ""


def _changed(path: str, settings: Any, defaults: Any, config: DictConfig) -> list[str]:
    """Return the settings that differ from their defaults, each with the key it takes its value from."""
    lines = []
    for field in fields(settings):
        value, default = getattr(settings, field.name), getattr(defaults, field.name)
        if field.name in ("kind", "data", "gate"):
            continue
        if is_dataclass(value):
            lines += _changed(f"{path}.{field.name}", value, default, config)
        elif value != default:
            raw = OmegaConf.select(config, path)._get_node(field.name)._value()
            origin = f"  # {raw}" if isinstance(raw, str) and raw.startswith("${") else ""
            lines.append(f"{path}.{field.name}: {value.value if isinstance(value, Enum) else value}{origin}")
    return lines


def _gate(step: Step) -> list[str]:
    gate = step.gate
    if not gate.enabled:
        return ["none: the artifact is promoted unseen"]
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
    return [head, *lines, *(f"warning: {_warning(each)}" for each in outlooks if each.hopeless)]


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
