"""Advice: each departure from the field's recipe is named with the reason, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from posttrain import report
from posttrain.commands import plan
from posttrain.config.compose import compose
from posttrain.config.paths import shipped
from posttrain.config.schema import LoraSettings, Method, Source
from posttrain.context import StageContext
from posttrain.data.mixing import count_records
from posttrain.hookspecs import hookimpl
from posttrain.host.plugins import Host
from posttrain.plan import make_plan
from posttrain.sft.advice import ADVICE, Known, usual_epochs
from posttrain.sft.config import SFTConfig
from posttrain.stage import Stage
from tests.support.fakes import Script, only_run, run_recipe, write_project
from tests.support.recipes import GIVEN, RECIPES

ADAPTER = SFTConfig(kind="sft", method=Method.lora, lr=2e-4, epochs=1)
FULL = replace(ADAPTER, method=Method.full, lr=1e-5)
DOCUMENTS = Path(__file__).parents[2] / "docs" / "advice.md"


def test_what_is_usual_is_not_mentioned() -> None:
    known = Known(
        examples=60_000, passes=1.0, documents_per_step=128.0, truncated=0.001, refusals=0.02, overlap=0,
        parameters=8_000_000_000, positions=8192,
    )  # fmt: skip
    for config in (ADAPTER, FULL):
        assert ADVICE.departures(config, known) == []
        assert ADVICE.departures(config, Known()) == []
        assert list(config.advice(None)) == []


SEVERAL = {"eval_share": 0.1}
"""What more than one epoch asks for."""
DEPARTURES: list[tuple[str, SFTConfig, dict[str, Any], Known]] = [
    ("lr: 0.001; usual is 1e-4 to 5e-4", ADAPTER, {"lr": 1e-3}, Known()),
    ("lr: 2e-05; usual is 1e-4 to 5e-4", ADAPTER, {"lr": 2e-5}, Known()),
    ("lr: 0.0002; usual is 1e-6 to 5e-5", FULL, {"lr": 2e-4}, Known()),
    ("lr: 1e-07; usual is 1e-6 to 5e-5", FULL, {"lr": 1e-7}, Known()),
    ("epochs: 2 for 50,000 examples", FULL, {"epochs": 2} | SEVERAL, Known(examples=50_000)),
    ("epochs: 4 for 10,000 examples", FULL, {"epochs": 4} | SEVERAL, Known(examples=10_000)),
    ("epochs: 6 for 1,000 examples", FULL, {"epochs": 6} | SEVERAL, Known(examples=1_000)),
    ("epochs: 16 for 999 examples", FULL, {"epochs": 16, "neftune_alpha": 5} | SEVERAL, Known(examples=999)),
    ("epochs: 1.5 for 50,000", FULL, {"epochs": 4, "max_steps": 9} | SEVERAL, Known(examples=50_000, passes=1.5)),
    ("eval_share: no eval records in 2 epochs", ADAPTER, {"epochs": 2}, Known()),
    ("eval_data: 3 eval records are trained", ADAPTER, {"eval_data": "a.jsonl"}, Known(overlap=3)),
    ("gradient_accumulation: an optimizer step sees 16", ADAPTER, {}, Known(documents_per_step=16.0)),
    ("gradient_accumulation: an optimizer step sees 300", ADAPTER, {}, Known(documents_per_step=300.0)),
    ("warmup_ratio: 0; usual", ADAPTER, {"warmup_ratio": 0.0}, Known()),
    ("warmup_ratio: 0.5; usual", ADAPTER, {"warmup_ratio": 0.5}, Known()),
    ("min_lr_ratio: 0.5; usual", ADAPTER, {"min_lr_ratio": 0.5}, Known()),
    ("weight_decay: 0.3; usual", ADAPTER, {"weight_decay": 0.3}, Known()),
    ("sequence_length: 2,048 tokens for a model of 512", ADAPTER, {}, Known(positions=512)),
    ("sequence_length: 5.0% of the records are cut", ADAPTER, {}, Known(truncated=0.05)),
    ("packing: off", ADAPTER, {"packing": False, "gradient_accumulation": 32}, Known()),
    ("gradient_checkpointing: off for 8.0 b", ADAPTER, {"gradient_checkpointing": False}, Known(parameters=8 * 10**9)),
    (
        "gradient_checkpointing: off for 8,192 tokens",
        ADAPTER,
        {"gradient_checkpointing": False, "sequence_length": 2048, "per_device_batch_size": 4},
        Known(),
    ),
    ("neftune_alpha: 50; usual", ADAPTER, {"neftune_alpha": 50}, Known()),
    ("neftune_alpha: none for 500 examples seen 2 times", FULL, {"epochs": 2} | SEVERAL, Known(examples=500)),
    ("lora.r: 4; usual", ADAPTER, {"lora": LoraSettings(r=4, alpha=8)}, Known()),
    ("lora.alpha: 128 at rank 16", ADAPTER, {"lora": LoraSettings(r=16, alpha=128)}, Known()),
    ("lora.dropout: 0.5; usual", ADAPTER, {"lora": LoraSettings(dropout=0.5)}, Known()),
    ("lora.target_modules: 1 modules", ADAPTER, {"lora": LoraSettings(target_modules=["q_proj"])}, Known()),
    ("data: 30% of the answers are refusals", ADAPTER, {}, Known(refusals=0.3)),
]
"""The beginning of a piece of advice, and what brings it up."""


@pytest.mark.parametrize(("expected", "config", "settings", "known"), DEPARTURES)
def test_a_departure_is_named_alone_with_what_is_usual_and_why(
    expected: str, config: SFTConfig, settings: dict[str, Any], known: Known
) -> None:
    (line,) = ADVICE.departures(replace(config, **settings), known)
    assert line.startswith(expected)
    rule = next(rule for rule in ADVICE.rules if line.endswith(f"usual is {rule.usual}, because {rule.why}"))
    assert line.startswith(f"{rule.setting}: ")


def test_every_rule_is_tried() -> None:
    said = {
        line
        for _, config, settings, known in DEPARTURES
        for line in ADVICE.departures(replace(config, **settings), known)
    }
    assert all(any(line.endswith(f"because {rule.why}") for line in said) for rule in ADVICE.rules)


def test_the_adapters_settings_do_not_matter_to_full_fine_tuning() -> None:
    lora = LoraSettings(r=1, alpha=100, dropout=0.9, target_modules=["q_proj"])
    assert ADVICE.departures(replace(FULL, lora=lora), Known()) == []


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_more_examples_never_allow_more_epochs(one: int, other: int) -> None:
    assert usual_epochs(max(one, other)) <= usual_epochs(min(one, other))
    assert 1 <= usual_epochs(one) <= 15


def test_the_documentation_holds_every_rule_as_it_is() -> None:
    command = 'python -c "from posttrain.sft.advice import ADVICE; print(ADVICE.table())"'
    assert ADVICE.table() in DOCUMENTS.read_text(), f"put into docs/advice.md what this prints: {command}"


# --- Examples, before the data is read --------------------------------------------------------------------------------


def write(path: str, count: int) -> str:
    Path(path).write_text("".join(f'{{"prompt": "{i}", "completion": "b"}}\n' for i in range(count)) + "\n")
    return path


def test_records_are_counted_with_limits_and_weights() -> None:
    path = write("a.jsonl", 30)
    Path("b.json").write_text('{"not": "an array"}')
    assert count_records([Source(path=path)]) == 30
    assert count_records([Source(path=path, limit=20)]) == 20
    assert count_records([Source(path=path, limit=99, weight=2), Source(path=path, weight=0.5)]) == 75
    assert count_records([Source(path="b.json")]) is None
    assert count_records([Source(path="b.json", limit=7)]) == 7
    assert count_records([Source(path="owner/name", limit=100)]) == 100
    assert count_records([Source(path=path), Source(path="owner/name")]) is None


def test_records_of_arrays_and_of_tables_are_counted() -> None:
    found = [{"prompt": str(number), "completion": "b"} for number in range(12)]
    Path("a.json").write_text(json.dumps(found, indent=1))
    parquet.write_table(pyarrow.Table.from_pylist(found), "a.parquet")
    assert count_records([Source(path="a.json")]) == count_records([Source(path="a.parquet")]) == 12
    assert count_records([Source(path="a.json"), Source(path=write("a.jsonl", 30))]) == 42


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.txt"])
def test_what_holds_no_records_is_not_counted(name: str) -> None:
    Path(name).write_text("[1, 2")
    assert count_records([Source(path=name)]) is None


# --- Where it is shown ------------------------------------------------------------------------------------------------

_QUICKSTARTS = tuple(name for name in RECIPES if name.startswith("quickstart"))
JUSTIFIED = {name: {"lr", "eval_share", "neftune_alpha"} for name in _QUICKSTARTS} | {
    "tulu3_8b": {"epochs", "beta"},
    "lima": {"warmup_ratio", "packing"},
    "qwen3_30b_a3b": {"lora.target_modules"},
    "gpt_oss_20b": {"lora.target_modules"},
}
"""What the plans of shipped recipes advise although the recipe knows better; its comment says why."""


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_depart_only_where_they_say_why(host: Host, name: str) -> None:
    for file in ("a.json", "a.jsonl"):
        Path(file).write_text("[]")
    plan = make_plan(compose(host, [f"recipe={name}", *GIVEN.get(name, [])]), host)
    lines = [line for step in plan.steps for line in step.config.advice(count_records(step.sources))]
    assert {line.partition(":")[0] for line in lines} == JUSTIFIED.get(name, set())
    text = (shipped("recipes") / f"{name}.yaml").read_text()
    assert not lines or "# What posttrain plan advises otherwise" in text


def test_the_plan_shows_it(capsys: pytest.CaptureFixture[str], working_folder: Path) -> None:
    write_project(working_folder)
    words = ["recipe=mine", "stages=[sft]", "+gate@sft.gate=none", "sft.lr=1e-2", "sft.epochs=20"]
    plan.main(words)
    text = capsys.readouterr().out
    assert "  advice sft.lr: 0.01; usual is 1e-4 to 5e-4 for an adapter" in text
    assert "  advice sft.epochs: 20 for 1 examples" in text
    plan.main([*words, "--json"])
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    settings = [line.partition(":")[0] for line in stage["advice"]]
    assert settings == ["sft.lr", "sft.epochs", "sft.eval_share", "sft.neftune_alpha"]


class Odd:
    """A plugin whose stage finds something unusual."""

    @hookimpl(wrapper=True)
    def run_stage(self, stage: Stage, context: StageContext) -> Any:
        context.warn("[strange]: and | odd")
        context.metrics["eval_loss"] = 1.25
        return (yield)


def test_warnings_are_in_log_state_manifest_and_report(
    capsys: pytest.CaptureFixture[str], working_folder: Path
) -> None:
    write_project(working_folder)
    run_recipe(Script(), others=[Odd()])
    run = only_run()
    assert "warning: [strange]: and | odd" in (working_folder / "log.txt").read_text()
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert [stage["warnings"] for stage in stages] == [["[strange]: and | odd"]] * 2
    manifest = json.loads((run / "stages/sft/artifact/manifest.json").read_text())
    assert manifest["metrics"]["warnings"] == ["[strange]: and | odd"]
    assert "- **sft**: [strange]: and | odd" in (run / "report.md").read_text()
    assert "- **sft**: eval loss 1.2500" in (run / "report.md").read_text()
    capsys.readouterr()
    report.show(run)
    shown = capsys.readouterr().out
    assert "sft: [strange]: and | odd" in shown
    assert "sft: eval loss 1.2500" in shown
