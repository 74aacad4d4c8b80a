"""Stages of preferences in any order and number: composed, planned, run, resumed, or rejected with the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain.artifact import verify
from posttrain.config.compose import compose
from posttrain.errors import BadInput
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.pipeline import run
from posttrain.plan import Plan, make_plan
from posttrain.run.directory import RunDirectory
from posttrain.run.display import Display
from tests.support.fakes import Script, only_run, run_json, run_recipe, states, write_project
from tests.support.tiny import write_base

KTO = ["+stage@kto=kto", "kto.data=feedback.jsonl", "+gate@kto.gate=none"]
SECOND = ["+stage@dpo2=dpo", "dpo2.data=pairs.jsonl", "+gate@dpo2.gate=none"]
RECIPE = """\
defaults:
  - /stage@sft: sft
  - /gate@sft.gate: none
  - /stage@dpo: dpo
  - /gate@dpo.gate: none
  - _self_
model: {path: base, dtype: float32}
sft: {data: train.jsonl, method: lora, lr: 1e-2, lora: {r: 4, alpha: 8}, sequence_length: 64, gradient_accumulation: 1}
dpo: {data: pairs.jsonl, lr: 1e-3, gradient_accumulation: 1, checkpoint_steps: 1}
"""
WORDS = ["red", "blue", "green", "clay"]


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> Path:
    """A recipe ``mine``, with records of every shape; its base is only good for planning."""
    write_project(working_folder)
    (working_folder / "recipes/mine.yaml").write_text(RECIPE)
    rows: dict[str, list[dict[str, Any]]] = {
        "train": [{"prompt": f"a {word}", "completion": f"the {word}"} for word in WORDS],
        "pairs": [{"prompt": f"a {word}", "chosen": f"the {word}", "rejected": "no"} for word in WORDS],
        "feedback": [
            {"prompt": f"a {word}", "completion": word, "label": word < "c"} for word in [*WORDS, "ash", "zoo"]
        ],
    }
    for name, records in rows.items():
        (working_folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return working_folder


@pytest.fixture
def tiny_base(project: Path) -> None:
    write_base(project / "base")


def planned(host: Host, *overrides: str) -> Plan:
    return make_plan(compose(host, ["recipe=mine", *overrides]), host)


def trained(*overrides: str) -> RunDirectory:
    """Run the recipe for real."""
    host = plugins.load()
    with open("log.txt", "a") as shown:
        return run(planned(host, *overrides), host, Display(Console(file=shown, width=200)))


def losses(stage: str) -> list[float]:
    steps = [json.loads(line) for line in (only_run() / "metrics.jsonl").read_text().splitlines()]
    return [step["loss"] for step in steps if step["stage"] == stage]


@pytest.mark.parametrize(
    ("overrides", "names", "kinds"),
    [
        (SECOND, ["sft", "dpo", "dpo2"], ["sft", "dpo", "dpo"]),
        (KTO, ["sft", "dpo", "kto"], ["sft", "dpo", "kto"]),
        ([*KTO, *SECOND], ["sft", "dpo", "kto", "dpo2"], ["sft", "dpo", "kto", "dpo"]),
        ([*KTO, "stages=[sft,kto,dpo]"], ["sft", "kto", "dpo"], ["sft", "kto", "dpo"]),
        ([*KTO, "~stage@dpo"], ["sft", "kto"], ["sft", "kto"]),
        ([*KTO, "stages=[sft,kto]"], ["sft", "kto"], ["sft", "kto"]),
        (["stage@dpo=orpo"], ["sft", "dpo"], ["sft", "orpo"]),
        (["~stage@dpo"], ["sft"], ["sft"]),
    ],
)
def test_stages_are_repeated_added_removed_and_put_in_order(
    host: Host, overrides: Sequence[str], names: list[str], kinds: list[str]
) -> None:
    plan = planned(host, *overrides)
    assert [step.name for step in plan.steps] == names
    assert [step.stage.name for step in plan.steps] == kinds


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "cpo", "simpo"])
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_every_kind_takes_its_rate_from_the_variant(host: Host, kind: str, variant: str) -> None:
    added = [f"+stage@last={kind}", "last.data=pairs.jsonl", "+gate@last.gate=none", f"variant={variant}"]
    rate = planned(host, *added).steps[-1].config.lr  # type: ignore[attr-defined]
    assert 0 < rate < (1e-5 if variant == "full" else 1e-4)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([*KTO, "stages=[kto,sft]"], "the pipeline starts with 'kto'\n    SFT is mandatory and first"),
        ([*KTO, "~stage@sft"], "the pipeline starts with 'dpo'"),
        ([*KTO, "stages=[sft,kto,kto]"], "'kto' occurs twice\n    Give the second a name: +stage@kto2=kto"),
        ([*SECOND, "stages=[sft,dpo,sft]"], "'sft' occurs twice\n    SFT is first and only once"),
        (["stages=[sft,kto]"], "the recipe has no stage 'kto'\n    Add it: +stage@kto=kto"),
        (["stages=[sft,dpp]"], "the recipe has no stage 'dpp'\n    Did you mean dpo?"),
        (["+stage@dpo=dpo"], "+stage@dpo=dpo: the recipe already has stage@dpo\n    Leave out the + "),
        (["+stage@dpo=dpo"], "or give the second a name of its own: +stage@dpo2=dpo"),
        (["+stage@dpo=kto"], "or give the second a name of its own: +stage@kto=kto"),
        (["+gate@dpo.gate=none", "dpo.bta=1"], "+gate@dpo.gate=none: the recipe already has gate@dpo.gate"),
        (["+gate@dpo.gate=none", "dpo.bta=1"], "Did you mean dpo.beta?"),
        (["dpo.loss_type=[sigmod]"], "no loss is called 'sigmod'. Did you mean sigmoid?"),
        (["dpo.loss_type=[sigmoid,sft]", "dpo.loss_weights=[1]"], "dpo.loss_weights: 1 weights for 2 losses"),
        (["dpo.loss_typ=[ipo]"], "Did you mean dpo.loss_type?"),
        ([*KTO, "kto.loss_type=bco"], "kto.loss_type: no loss is called 'bco'"),
    ],
)
def test_nonsense_is_rejected_with_the_reason(host: Host, overrides: Sequence[str], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        planned(host, *overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["dpo.data=feedback.jsonl"], "the record has the shape prompt_completion, but the stage needs preferences"),
        ([*KTO, "kto.data=train.jsonl"], "label must be true or false, not None"),
        (["sft.data=pairs.jsonl"], "the record has the shape preference, but the stage needs documents"),
        (["sft.data=feedback.jsonl"], "label is false: the answer was judged bad"),
    ],
)
def test_records_of_another_shape_cost_no_training(overrides: Sequence[str], expected: str) -> None:
    script = Script()
    with pytest.raises(BadInput) as caught:
        run_recipe(script, *overrides)
    assert expected in str(caught.value)
    assert script.trained == []


@pytest.mark.usefixtures("tiny_base")
def test_stages_are_stacked_each_on_the_one_before() -> None:
    pairs_for_all = ["kto.data=[feedback.jsonl,pairs.jsonl]", "kto.gradient_accumulation=1", "kto.lr=1e-3"]
    other = ["+stage@last=orpo", "last.data=pairs.jsonl", "+gate@last.gate=none", "last.lr=1e-3"]
    directory = trained(*KTO, *pairs_for_all, *SECOND, "dpo2.loss_type=[ipo]", *other)
    assert states() == dict.fromkeys(["sft", "dpo", "kto", "dpo2", "last"], "promoted")
    stages = run_json()["stages"]
    assert [stage["parent_digest"] for stage in stages[1:]] == [stage["digest"] for stage in stages[:-1]]
    assert verify(directory.path / stages[-1]["artifact"]).manifest.lineage == ("sft", "dpo", "kto", "dpo", "orpo")
    assert losses("dpo")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses("kto")[0] == pytest.approx(0.5, abs=1e-4)
    assert losses("dpo2")[0] == pytest.approx(25, abs=1e-3)  # against what kto left, not against SFT


@pytest.mark.usefixtures("tiny_base")
@pytest.mark.parametrize(
    "made",
    [
        ["sft.method=full"],
        ["sft.method=qlora"],
        ["sft.lora.dora=true"],
        ["sft.lora.rslora=false"],
        ["model.added_tokens=['<|new|>']"],
    ],
    ids=["full", "qlora", "dora", "plain", "tokens"],
)
def test_every_artifact_that_sft_makes_is_stacked_upon(made: list[str]) -> None:
    trained(*made, *KTO, "kto.gradient_accumulation=1", "kto.per_device_batch_size=3", "kto.lr=1e-3")
    assert states() == {"sft": "promoted", "dpo": "promoted", "kto": "promoted"}
    assert losses("dpo")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses("kto")[0] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.usefixtures("tiny_base")
def test_a_run_that_died_in_any_stage_is_finished_by_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """The process died here."""

    command = [*KTO, "kto.gradient_accumulation=1", "kto.per_device_batch_size=3", "kto.checkpoint_steps=1"]
    trained(*command, "output_root=clean")
    (clean,) = Path("clean").glob("*/run.json")
    for kind in ("dpo", "kto"):
        with monkeypatch.context() as patch:
            patch.setattr(f"posttrain_preference.objectives.{DYING[kind]}.figures", dying(Killed))
            with pytest.raises(Killed):
                trained(*command)
        assert states()[kind] == "failed"
    trained(*command)
    assert states() == {"sft": "promoted", "dpo": "promoted", "kto": "promoted"}
    wanted = {str(p.relative_to(clean.parent)): p.read_bytes() for p in clean.parent.rglob("artifact/*")}
    assert {str(p.relative_to(only_run())): p.read_bytes() for p in only_run().rglob("artifact/*")} == wanted


DYING = {"dpo": "DPOLoss", "kto": "KTOLoss"}


def dying(error: type[BaseException]) -> Any:
    def figures(loss: Any, sums: Any, totals: Any) -> dict[str, float]:
        raise error

    return figures
