"""A run of a few bytes: a base without a model, instant stages, a gate with scripted verdicts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from posttrain.config.compose import compose
from posttrain.context import StageContext
from posttrain.digests import digest_of
from posttrain.gate.spec import GateRequest, Scorecard, Verdict, VerdictState
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.pipeline import run
from posttrain.plan import make_plan
from posttrain.run.directory import RunDirectory
from posttrain.run.display import Display
from posttrain.stage import Stage
from tests.support.judgements import task_verdict

RECIPE = """\
defaults:
  - /stage@sft: sft
  - /stage@dpo: dpo
  - _self_
model: {path: base, dtype: float32}
sft: {data: train.jsonl, method: lora}
dpo: {data: pairs.jsonl}
"""
TASK = "task: some\ndataset_path: json\nmetric_list:\n  - {metric: acc, aggregation: mean}\n"


def write_project(folder: Path) -> None:
    """A recipe ``mine`` with its base, data and gate in ``folder``."""
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine.yaml").write_text(RECIPE)
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (folder / "some.yaml").write_text(TASK)
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("template")
    save_file({"weight": np.ones((4, 4), np.float32)}, base / "model.safetensors")


class Script:
    """What the stages and the gate of a test do; it is a plugin."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.judged: list[str] = []
        self.verdicts: dict[str, VerdictState] = {}
        self.during_training: Callable[[StageContext], None] = lambda context: None
        self.during_evaluation: Callable[[GateRequest], None] = lambda request: None

    @hookimpl
    def run_stage(self, stage: Stage, context: StageContext) -> bool:
        self.trained.append(context.name)
        context.progress.start(2)
        context.progress.step(1, {"loss": 1.0, "tokens": 10.0})
        self.during_training(context)
        write_adapter(context)
        context.metrics["tokens"] = 20
        return True

    @hookimpl
    def evaluate_artifact(self, request: GateRequest) -> Scorecard:
        self.judged.append(request.stage)
        self.during_evaluation(request)
        return Scorecard(rows=(), higher_is_better={})

    @hookimpl
    def judge_artifact(self, request: GateRequest) -> Verdict:
        state = self.verdicts.get(request.stage, "pass")
        return Verdict(state=state, gated=True, tasks=(task_verdict(state),), reason=f"{request.stage} is a {state}")


def write_adapter(context: StageContext) -> None:
    """An adapter that depends on the stage's name, seed and parent."""
    start = int(digest_of([context.name, context.parent.digest, context.seed])[:5], 16)
    weights = {
        "base_model.model.layer.lora_A.weight": np.full((2, 4), start, np.float32),
        "base_model.model.layer.lora_B.weight": np.full((4, 2), start, np.float32),
    }
    save_file(weights, context.output / "adapter_model.safetensors", metadata={"format": "pt"})
    (context.output / "adapter_config.json").write_text(json.dumps({"r": 2, "target_modules": ["layer"]}))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(context.parent.tokenizer / name, context.output / name)


def scripted_host(script: Script, *others: object) -> Host:
    host = plugins.load()
    for room in ("scoring", "gate"):  # the script is the gate
        host.manager.unregister(name=f"{room}.plugin")
    for plugin in (script, *others):
        host.manager.register(plugin)
    return host


GATES: Sequence[str] = tuple(
    f"+{stage}.gate.tasks.some={{role: lift, metric: acc, task: some.yaml}}" for stage in ("sft", "dpo")
)


def run_recipe(script: Script, *overrides: str, others: Sequence[object] = ()) -> RunDirectory:
    """Run the recipe ``mine`` of the working folder under a script."""
    return run_on(scripted_host(script, *others), *overrides)


def run_on(host: Host, *overrides: str) -> RunDirectory:
    """Run the recipe ``mine`` of the working folder on a host that may have run others before."""
    plan = make_plan(compose(host, ["recipe=mine", *GATES, *overrides]), host)
    with open("log.txt", "a") as shown:
        return run(plan, host, Display(Console(file=shown, width=200)))


def only_run() -> Path:
    """The directory of the one run below ./runs."""
    (state,) = Path("runs").glob("*/run.json")
    return state.parent


def run_json() -> Mapping[str, Any]:
    return dict(json.loads((only_run() / "run.json").read_text()))


def states() -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in run_json()["stages"]}
