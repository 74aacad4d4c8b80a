"""A plain recipe, which has no ``defaults``: a model, data, stages and a gate, and the full form that it stands for.

model: HuggingFaceTB/SmolLM2-135M-Instruct          defaults:
data: chats.jsonl                                     - /stage@sft: sft
rank: 16                                     ─►       - /gate@sft.gate: perplexity
lr: 1e-4                                              - _self_
gate: {name: perplexity, data: test.jsonl}          model: {path: HuggingFaceTB/SmolLM2-135M-Instruct}
data: {path: chats.jsonl}
sft: {data: null, lora: {r: 16}, lr: 1e-4, gate: {tasks: ...}}
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from posttrain.config.schema import MISSING, ROOT, GateConfig, Method, ModelConfig, StageConfig
from posttrain.errors import BadInput, Problem, nearest, shown

CORE = "sft"
PLAIN = ("model", "data", "method", "stages", "gate", "rank", "lr", "epochs", "spend_cap")
"""Keys that a message names first."""
CHOICES = ("variant", "tracker", "launch")
"""Groups of which a plain recipe chooses an option by its name."""
SYNONYMS = {
    "learning_rate": "lr", "num_epochs": "epochs", "num_train_epochs": "epochs", "lora_r": "rank", "r": "rank",
    "lora_rank": "rank", "lora_alpha": "lora", "batch_size": "per_device_batch_size",
    "micro_batch_size": "per_device_batch_size", "per_device_train_batch_size": "per_device_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation", "max_length": "sequence_length",
    "max_seq_length": "sequence_length", "sequence_len": "sequence_length", "cutoff_len": "sequence_length",
    "warmup": "warmup_ratio", "base_model": "model", "model_name": "model", "model_name_or_path": "model",
    "dataset": "data", "datasets": "data", "train_file": "data", "adapter": "variant", "evaluation": "gate",
    "eval": "gate", "test": "gate", "budget": "spend_cap", "output_dir": "output_root", "val_set_size": "eval_share",
    "lrate": "lr",
}  # fmt: skip
"""Names of settings elsewhere, with ours."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """The names that a plain recipe may use."""

    stages: Mapping[str, type[StageConfig]]
    """Settings by kind of stage."""
    nodes: Sequence[str]
    """Keys of plugins at the top level."""
    is_model: Callable[[str], bool]
    """Return True for the name of a model file."""
    is_gate: Callable[[str], bool]
    """Return True for the name of a gate."""
    gate: Callable[[str], Mapping[str, Any]]
    """Return the settings in the file of a gate; none for a name without one."""


@dataclass
class _Form:
    """The full form in the making."""

    path: Path
    raw: Mapping[str, Any]
    known: Known
    defaults: list[Any] = field(default_factory=list)
    overrides: list[Any] = field(default_factory=list)
    nodes: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    """Kinds of the stages by name, in order."""
    origins: dict[str, str] = field(default_factory=dict)
    """Key of the recipe by key of the full form, where the two differ."""
    problems: list[Problem] = field(default_factory=list)

    def problem(self, key: str, what: str, fix: str = "") -> None:
        self.problems.append(Problem(where=f"{self.path}: {key}", what=what, fix=fix))

    def put(self, stage: str, key: str, value: Any, origin: str) -> None:
        """Set a setting of a stage, unless the stage gives it itself."""
        node = self.nodes.setdefault(stage, {})
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf not in node:
            node[leaf] = value
            self.origins[f"{stage}.{key}"] = origin

    def settings(self, stage: str) -> set[str]:
        """Return the names of a stage's settings; none for a kind that is not known, which composing explains."""
        kind = self.known.stages.get(self.kinds[stage])
        return {each.name for each in fields(kind)} if kind else set()


def full_form(path: Path, raw: Mapping[str, Any], known: Known) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the full form of a plain recipe, and the keys of the recipe by those of the full form that differ.

    Raises BadInput with every key that is unknown or out of place.
    """
    form = _Form(path, raw, known)
    _add_stages(form)
    _add_model(form)
    _add_data(form)
    _add_gates(form)
    _add_flat_settings(form)
    for key in (*ROOT, *known.nodes):
        if key in raw and key not in ("model", "data", "stages"):
            _add_root(form, key, raw[key])
    _check_keys(form)
    if form.problems:
        raise BadInput(list(dict.fromkeys(form.problems)))
    return {"defaults": [*form.defaults, *form.overrides, "_self_"], **form.nodes}, form.origins


def _add_stages(form: _Form) -> None:
    """Add the stages: of ``stages``, else the kinds that are keys of the recipe, else of ``method``, else SFT."""
    raw, given = form.raw, form.raw.get("stages")
    listed = [] if given is None else _names(given)
    named = {key: raw[key] for key in raw if key in form.known.stages or key in {*listed} - {*ROOT, *PLAIN}}
    if given is None:
        stages = named or {_method(form): {}}
    else:
        stages = _listed(form, given)
        for name in dict.fromkeys([*stages, *named]):
            both = [each[name] for each in (stages, named) if each.get(name)]
            stages[name] = both[0] if both else {}
            if len(both) == 2:
                form.problem(name, "has settings here and in stages", "Give them in one place")
        if named.keys() - listed:
            form.nodes["stages"] = listed
    for name, settings in stages.items():
        _add_stage(form, str(name), settings)


def _method(form: _Form) -> str:
    method = form.raw.get("method", CORE)
    if method in {each.value for each in Method}:
        form.problem("method", f"{method} says which weights are trained", f"Write variant: {method}")
    elif method not in form.known.stages:
        names = {name: name for name in form.known.stages} | {each.value: f"variant: {each.value}" for each in Method}
        close = nearest(str(method), names)
        fix = f"Did you mean {names[close]}? " if close else ""
        fix += f"Available: {', '.join(sorted(form.known.stages))}"
        form.problem("method", f"no stage is named {shown(method)}", fix)
    else:
        return str(method)
    return CORE


def _names(given: Any) -> list[str]:
    entries = given if isinstance(given, list | Mapping) else ()
    return [str(name) for entry in entries for name in (entry if isinstance(entry, Mapping) else (entry,))]


def _listed(form: _Form, given: Any) -> dict[str, Any]:
    """Return the settings of the stages in a list of names, a list of single mappings, or one mapping."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        given = [{name: settings} for name, settings in given.items()]
    found: dict[str, Any] = {}
    for entry in given if isinstance(given, list) else (given,):
        for name, settings in (entry if isinstance(entry, Mapping) else {entry: None}).items():
            if not isinstance(name, str):
                fix = "Write names, such as [sft, dpo], or names with settings"
                form.problem("stages", f"{shown(name)} is no name of a stage", fix)
            elif name in found:
                form.problem("stages", f"{name!r} occurs twice", f"Give the second a name of its own with kind: {name}")
            else:
                found[name] = settings or {}
    return found


def _add_stage(form: _Form, name: str, settings: Any) -> None:
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        form.problem(name, f"must be a mapping of settings, not {shown(settings)}")
        return
    kind = form.kinds[name] = str(settings.get("kind", name))
    form.defaults.append({f"/stage@{name}": kind})
    form.nodes[name] = {key: value for key, value in settings.items() if key not in ("kind", "gate", "rank")}
    if "rank" in settings:
        _add_rank(form, name, settings["rank"], f"{name}.rank")
    known = form.settings(name)
    for key in _others(form.nodes[name], known) if known else ():
        place = f"stages.{name}.{key}" if "stages" in form.raw else f"{name}.{key}"
        form.problem(place, "is no setting of this stage", _closest(str(key), sorted(known - {"kind"}), kind))


def _add_model(form: _Form) -> None:
    model = form.raw.get("model")
    if isinstance(model, str):
        model = {"name": model} if form.known.is_model(model) else {"path": model}
        form.origins["model.path"] = "model"
    if model is None:
        return
    if not isinstance(model, Mapping):
        form.problem("model", f"must be a folder, a hub name or the name of a model file, not {shown(model)}")
        return
    known = [each.name for each in fields(ModelConfig)]
    for key in _others(model, {*known, "name"}):
        form.problem(f"model.{key}", "is no setting of a model", _closest(str(key), ["name", *known]))
    if "name" in model:
        form.overrides.append({"override /model": model["name"]})
    form.nodes["model"] = {key: value for key, value in model.items() if key != "name"}


def _add_data(form: _Form) -> None:
    """Add the recipe's data, for every stage whose own data is optional, and for the only stage in any case."""
    data = form.raw.get("data")
    if data is None:
        return
    if isinstance(data, str):
        form.nodes["data"], form.origins["data.path"] = {"path": data}, "data"
    elif isinstance(data, Mapping):
        form.nodes["data"] = dict(data)
    elif isinstance(data, list):
        for name in list(form.kinds)[:1]:
            form.put(name, "data", data, "data")
        return
    else:
        form.problem("data", f"must be a file, a hub name, a source or a list of sources, not {shown(data)}")
    if len(form.kinds) == 1 and _needs_data(form, (name := next(iter(form.kinds)))):
        form.put(name, "data", None, "data")


def _needs_data(form: _Form, name: str) -> bool:
    kind = form.known.stages.get(form.kinds[name])
    return kind is not None and any(each.name == "data" and each.default == MISSING for each in fields(kind))


def _add_gates(form: _Form) -> None:
    for name in form.kinds:
        own = (form.raw.get(name) or {}).get("gate") if isinstance(form.raw.get(name), Mapping) else None
        if own is None:
            listed = _listed(form, form.raw.get("stages") or {}).get(name)
            own = listed.get("gate") if isinstance(listed, Mapping) else None
        _add_gate(form, name, form.raw.get("gate") if own is None else own, "gate" if own is None else f"{name}.gate")


def _add_gate(form: _Form, stage: str, gate: Any, origin: str) -> None:
    """Add the gate of a stage: a name, an inline gate, or one by name with changes; without any, none."""
    if gate is None or gate is False:
        gate = "none"
    if isinstance(gate, str):
        gate = {"name": gate}
    if not isinstance(gate, Mapping):
        form.problem(origin, f"must be the name of a gate, or its settings, not {shown(gate)}")
        return
    known = [each.name for each in fields(GateConfig)]
    for key in _others(gate, {*known, "name", "data"}):
        form.problem(f"{origin}.{key}", "is no setting of a gate", _closest(str(key), ["name", "data", *known]))
    if "name" in gate:
        form.defaults.append({f"/gate@{stage}.gate": gate["name"]})
        form.origins[f"{stage}.gate"] = origin
    node: dict[str, Any] = {key: value for key, value in gate.items() if key in known}
    if "data" in gate:
        tasks = dict(form.known.gate(str(gate.get("name"))).get("tasks") or {}) | dict(node.get("tasks") or {})
        open_ones = [name for name, task in tasks.items() if isinstance(task, Mapping) and task.get("data") == MISSING]
        if not open_ones and (tasks or "name" not in gate or form.known.is_gate(str(gate["name"]))):
            form.problem(f"{origin}.data", "no task of this gate asks for a file", "Give tasks: {NAME: {data: FILE}}")
        given = {name: {"data": gate["data"]} for name in open_ones}
        node["tasks"] = {**given, **dict(node.get("tasks") or {})}
        form.origins |= {f"{stage}.gate.tasks.{name}.data": f"{origin}.data" for name in open_ones}
    if node:
        form.nodes[stage]["gate"] = node


def _add_flat_settings(form: _Form) -> None:
    """Add the settings of the only stage that are keys of the recipe; ``rank`` holds for every adapter."""
    if "rank" in form.raw:
        for name in form.kinds:
            if "lora" in form.settings(name):
                _add_rank(form, name, form.raw["rank"], "rank")
    for key in _others(form.raw, {*ROOT, *form.known.nodes, *form.known.stages, *form.kinds, *PLAIN[:6]}):
        owners = [name for name in form.kinds if key in form.settings(name)]
        if len(form.kinds) > 1 and owners:
            fix = f"Give it in one of them: stages: {{{owners[0]}: {{{key}: {form.raw[key]}}}}}"
            form.problem(str(key), f"is a setting of a stage, and there are {' and '.join(form.kinds)}", fix)
        elif owners and key in form.nodes[owners[0]] and not isinstance(form.raw[key], Mapping):
            form.problem(str(key), f"is given twice, here and in {owners[0]}", "Give it in one place")
        elif owners and isinstance(form.raw[key], Mapping):
            for leaf, value in form.raw[key].items():
                form.put(owners[0], f"{key}.{leaf}", value, f"{key}.{leaf}")
        elif owners:
            form.put(owners[0], str(key), form.raw[key], str(key))


def _add_rank(form: _Form, stage: str, rank: Any, origin: str) -> None:
    """Set the rank of an adapter, and with it the scale that is usual at this rank."""
    form.put(stage, "lora.r", rank, origin)
    if isinstance(rank, int):
        form.put(stage, "lora.alpha", 2 * rank, origin)


def _add_root(form: _Form, key: str, value: Any) -> None:
    if key in CHOICES and isinstance(value, str):
        value = {"name": value}
    if key in CHOICES and isinstance(value, Mapping):
        if "name" in value:
            form.overrides.append({f"override /{key}": value["name"]})
        value = {name: each for name, each in value.items() if name != "name"} or None
    if value is not None:
        form.nodes[key] = value


def _check_keys(form: _Form) -> None:
    """Add a problem for each key that means nothing, with the nearest that does."""
    settings = {key for name in form.kinds for key in form.settings(name)} - {"kind"}
    known = {*PLAIN, *ROOT, *form.known.nodes, *form.known.stages, *form.kinds, *settings}
    kind = next(iter(form.kinds.values()), CORE)
    for key in map(str, form.raw):
        if key not in known:
            form.problem(key, "is no key of a plain recipe", _closest(key, sorted({*PLAIN, *ROOT, *settings}), kind))


def _others(given: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return the keys that are not known, in the order of the recipe: that of a set differs between processes."""
    return [key for key in given if key not in known]


def _closest(name: str, known: Sequence[str], kind: str = "") -> str:
    """Return the fix of a wrong name: the nearest valid one in any case, and where the others are."""
    words = {other: ours for other, ours in SYNONYMS.items() if ours in known} | {each: each for each in known}
    asked = name.lower().replace("-", "_")
    close = asked if asked in words else nearest(asked, words) or nearest(asked, known, cutoff=0.0) or known[0]
    more = f"posttrain list {kind} has every setting of the stage" if kind else f"Available: {', '.join(known)}"
    return f"Did you mean {words[close]}? {more}"
