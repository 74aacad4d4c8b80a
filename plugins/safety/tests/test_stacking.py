"""The stage in a pipeline: behind SFT, before or behind DPO, twice, taken out, killed; bad data cost no training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safety_support.records import REFUSAL

from posttrain import BadInput
from posttrain.artifact import verify
from posttrain.config.compose import compose
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.pipeline import run
from posttrain.plan import Plan, make_plan
from posttrain.run.display import Display
from tests.support.fakes import Script, only_run, run_json, run_recipe, states, write_project
from tests.support.tiny import write_base

SMALL = "lr: 1e-2, sequence_length: 64, gradient_accumulation: 1, checkpoint_steps: 1"
RECIPE = f"""\
defaults:
  - /stage@sft: sft
  - /gate@sft.gate: none
  - /stage@dpo: dpo
  - /gate@dpo.gate: none
  - /stage@safety: safety
  - /gate@safety.gate: none
  - _self_
model: {{path: base, dtype: float32}}
sft: {{data: train.jsonl, method: lora, lora: {{r: 4, alpha: 8}}, {SMALL}}}
dpo: {{data: pairs.jsonl, lr: 1e-3, gradient_accumulation: 1, checkpoint_steps: 1}}
safety: {{data: safety.jsonl, {SMALL}}}
"""
WORDS = ["red", "blue", "green", "clay"]
SECOND = ["+stage@again=safety", "again.data=safety.jsonl", "+gate@again.gate=none", "again.refusal_share=0.25"]


def write(name: str, records: Sequence[dict[str, Any]]) -> None:
    Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> None:
    """A recipe ``mine``; its base is only good for planning."""
    write_project(working_folder)
    Path("recipes/mine.yaml").write_text(RECIPE)
    answers = [{"prompt": f"a {word}", "completion": f"the {word}"} for word in WORDS]
    write("train", answers)
    write("pairs", [{"prompt": f"a {word}", "chosen": f"the {word}", "rejected": "no"} for word in WORDS])
    write("refusals", [{"prompt": f"harm {word}", "completion": REFUSAL} for word in WORDS])
    write("safety", [*answers, {"prompt": "harm red", "completion": REFUSAL}])


@pytest.fixture
def tiny_base() -> None:
    write_base(Path("base"))


def planned(host: Host, *overrides: str) -> Plan:
    return make_plan(compose(host, ["recipe=mine", *overrides]), host)


def trained(*overrides: str) -> None:
    """Run the recipe for real."""
    host = plugins.load()
    with open("log.txt", "a") as shown:
        run(planned(host, *overrides), host, Display(Console(file=shown, width=200)))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["sft", "dpo", "safety"]),
        (["stages=[sft,safety,dpo]"], ["sft", "safety", "dpo"]),
        (["~stage@safety"], ["sft", "dpo"]),
        (["~stage@dpo"], ["sft", "safety"]),
        (SECOND, ["sft", "dpo", "safety", "again"]),
        ([*SECOND, "stages=[sft,safety,dpo,again]"], ["sft", "safety", "dpo", "again"]),
    ],
)
def test_it_is_put_anywhere_behind_sft(host: Host, overrides: Sequence[str], names: list[str]) -> None:
    assert [step.name for step in planned(host, *overrides).steps] == names


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages=[safety,sft]"], "the pipeline starts with 'safety'\n    SFT is mandatory and first"),
        (["safety.refusal_share=1"], "safety.refusal_share: must be above 0 and below 1"),
        (["safety.refusal_shar=0.4"], "Did you mean safety.refusal_share?"),
        (["safety.method=full"], "safety.method"),  # it trains what its parent is
    ],
)
def test_what_makes_no_sense_is_rejected_with_the_reason(host: Host, overrides: Sequence[str], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        planned(host, *overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("refusals.jsonl", "safety.data: holds 4 declining answers and no helpful one"),
        ("train.jsonl", "safety.data: holds 4 helpful answers and no declining one"),
        ("pairs.jsonl", "the record has the shape preference, but the stage needs conversations"),
    ],
)
def test_data_of_one_kind_cost_no_training(data: str, expected: str) -> None:
    script = Script()
    with pytest.raises(BadInput) as caught:
        run_recipe(script, f"safety.data={data}")
    assert expected in str(caught.value)
    assert script.trained == []


def test_records_of_eval_data_may_be_of_one_kind() -> None:
    script = Script()
    run_recipe(script, "safety.eval_data=refusals.jsonl")
    assert script.trained == ["sft", "dpo", "safety"]


@pytest.mark.usefixtures("tiny_base")
@pytest.mark.parametrize(
    ("overrides", "lineage"),
    [
        ([*SECOND, "stages=[sft,safety,dpo,again]"], ["sft", "safety", "dpo", "safety"]),
        (["~stage@dpo", "sft.method=full"], ["sft", "safety"]),
        (["stages=[sft,safety]", "sft.method=qlora"], ["sft", "safety"]),
    ],
)
def test_it_is_stacked_and_stacked_upon(overrides: Sequence[str], lineage: list[str]) -> None:
    trained(*overrides)
    stages = run_json()["stages"]
    assert {stage["state"] for stage in stages} == {"promoted"}
    assert [stage["parent_digest"] for stage in stages[1:]] == [stage["digest"] for stage in stages[:-1]]
    assert verify(only_run() / stages[-1]["artifact"]).manifest.lineage == tuple(lineage)


class Killed(BaseException):
    """The process died here."""


@pytest.mark.usefixtures("tiny_base")
def test_a_run_that_died_is_finished_by_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.engine.checkpoint import CheckpointFolder

    command = ["stages=[sft,safety,dpo]", "safety.epochs=3"]
    trained(*command, "output_root=clean")
    (clean,) = Path("clean").glob("*/run.json")
    write = CheckpointFolder.write

    def save_and_die(self: CheckpointFolder, *given: Any) -> None:
        write(self, *given)
        if "safety" in str(self.folder):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "write", save_and_die)
        with pytest.raises(Killed):
            trained(*command)
    trained(*command)
    assert states() == {"sft": "promoted", "safety": "promoted", "dpo": "promoted"}
    wanted = {str(path.relative_to(clean.parent)): path.read_bytes() for path in clean.parent.rglob("artifact/*")}
    assert {str(path.relative_to(only_run())): path.read_bytes() for path in only_run().rglob("artifact/*")} == wanted
