"""What ``posttrain plan`` says of a model before it is loaded: its weights by kind, and the share under an adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.architectures import tiny_model
from tests.support.command import main
from tests.support.tiny import tiny_tokenizer, write_base

RECIPE = """\
defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]
model: {path: base, dtype: float32}
sft: {data: train.jsonl, sequence_length: 96}
"""


@pytest.fixture
def project(working_folder: Path) -> Path:
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    (working_folder / "train.jsonl").write_text(json.dumps({"prompt": "1+1", "completion": "2"}))
    tiny_model("gpt_oss").save_pretrained(working_folder / "base")
    tiny_tokenizer().save_pretrained(working_folder / "base")
    return working_folder


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main("plan", "recipe=mine", *words) == 0
    return capsys.readouterr().out


def test_weights_are_shown_by_kind_and_the_adapter_with_its_share(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = tiny_model("gpt_oss")
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("bias")}
    experts = sum(size for name, size in matrices.items() if "experts" in name)
    text = plan(capsys)
    assert f"weights  {sum(matrices.values()):,} in matrices:" in text
    assert f"experts {experts / sum(matrices.values()):.1%}" in text
    assert "reach  all-linear: linear layers and experts" in text
    attention = sum(size for name, size in matrices.items() if name.endswith(("q_proj.weight", "v_proj.weight")))
    named = plan(capsys, "sft.lora.target_modules=[q_proj,v_proj]")
    assert f"reach  q_proj, v_proj: 4 matrices, {attention / sum(matrices.values()):.1%} of the weights" in named
    assert "reach" not in plan(capsys, "variant=full")


def test_experts_that_four_bits_leave_out_are_advised_of(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "% of the weights are experts; where the architecture fuses them" in plan(capsys, "variant=qlora")
    (stage,) = json.loads(plan(capsys, "variant=qlora", "--json"))["stages"]
    assert any("are experts" in line for line in stage["advice"])
    assert "are experts" not in plan(capsys)


def test_memory_and_disk_are_shown_for_each_stage(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys)
    assert re.search(r"memory [\d.]+ GB with engine single \(there is one device\): weights [\d.]+ GB", text)
    assert re.search(r"memory .*, copy [\d.]+ GB", text)
    assert re.search(r"disk   checkpoints: [\d.]+ GB each, [\d.]+ GB for the 2 that are kept, [\d.]+ GB while", text)
    (stage,) = json.loads(plan(capsys, "--json"))["stages"]
    needs = stage["needs"]
    assert (needs["engine"], needs["processes"]) == ("single", 1)
    assert needs["memory"]["weights"] > 0 < needs["checkpoint"]


def test_memory_beyond_the_device_is_warned_of(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.cost.needs.device_memory", lambda processes: 100_000)
    assert "memory warning: a device has 0.00 GB; the largest part is" in plan(capsys)
    helping = {"full": "variant=lora or variant=qlora, or ", "lora": "variant=qlora, or ", "qlora": ""}
    for variant, others in helping.items():
        text = plan(capsys, f"variant={variant}", "sft.sequence_length=2", "sft.loss_chunk=1", "sft.lora.r=1")
        assert re.search(f"the largest part is [a-z]+: try {others}engine=fsdp on more devices", text), text


def test_the_engine_of_several_devices_is_the_first_that_fits(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = ["launch=local", "launch.processes=2", "sft.gradient_accumulation=2"]
    monkeypatch.setattr("posttrain.launch.shape.cores", lambda: 2)
    assert "on each of 2 devices with engine ddp (everything fits on each device:" in plan(capsys, *several)
    assert "with engine fsdp (as set)" in plan(capsys, *several, "engine=fsdp")
    monkeypatch.setattr("posttrain.cost.needs.device_memory", lambda processes: 100_000)
    assert "with engine fsdp (with everything on each device it takes" in plan(capsys, *several)


@pytest.mark.parametrize("damage", ["cut", "missing", "hub"])
def test_a_model_that_cannot_be_read_yet_is_no_obstacle(
    project: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    weights = project / "base" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing":
        weights.unlink()
    text = plan(capsys, *(["model.path=some/model"] if damage == "hub" else []))
    assert "in matrices" not in text
    assert ("memory " in text) == (damage == "missing")  # without weights the configuration still tells the sizes


def test_steps_tokens_time_and_cost_are_expected_of_each_stage(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plan(capsys, "on=8 x H100", "price_per_hour=3 USD")
    assert "on     8 x H100" in text
    assert re.search(r"time   2 steps, \d+ tokens", text)
    assert re.search(r"of training \(.* to .*\), [\d.]+ USD", text)
    (stage,) = json.loads(plan(capsys, "on=24GB", "--json"))["stages"]
    assert stage["estimate"]["seconds"] is None
    assert stage["needs"]["device"] == 24_000_000_000


def test_a_model_that_is_elsewhere_is_planned_by_its_published_sizes(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plan(capsys, "model.path=meta-llama/Llama-3.1-8B", "model.dtype=bfloat16", "on=A100")
    assert "weights 16.4 GB" in text
    assert "no sizes" not in text
    unknown = plan(capsys, "model.path=owner/unknown")
    assert "not known: the sizes of owner/unknown" in unknown


def test_two_steps_are_measured_and_leave_nothing(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(working_folder / "base")
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    rows = [{"prompt": f"{number}+1", "completion": f"{number + 1}"} for number in range(200)]
    (working_folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main("plan", "recipe=mine", "--measure", "sft.gradient_accumulation=2", "sft.prepare.enabled=false") == 0
    printed = capsys.readouterr()
    assert "as two steps here took" in printed.out
    assert printed.err.count("two steps of sft, in a run of its own that is removed") == 1
    assert [line for line in printed.err.splitlines() if line.startswith("sft ")] == []
    assert "sft      train  attention" in (working_folder / "runs" / "measure.log").read_text()
    assert not [*(working_folder / "runs").glob("measure-*")]
    assert main("plan", "recipe=mine", "--measure", "on=H100") == 2
    assert "on this machine" in capsys.readouterr().err
