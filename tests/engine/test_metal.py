"""A Mac's GPU has no float64: a whole run on such a device, with Metal's operations alone, gives the CPU's numbers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from posttrain.errors import BadInput
from posttrain.model import device
from posttrain.testing.project import WORDS, example_records
from tests.support import warm
from tests.support.tiny import write_base

ROOT = Path(__file__).parents[2]
CHOOSE = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/colours.jsonl}}
test_split: test
output_type: OUTPUT
doc_to_text: "{{question}}"
doc_to_target: TARGET
metric_list:
  - {metric: METRIC, aggregation: mean, higher_is_better: true}
"""
CHOSEN = {"OUTPUT": "multiple_choice", "METRIC": "acc", "TARGET": '"{{label}}"\ndoc_to_choice: ["red", "blue"]'}
WRITTEN = {"OUTPUT": "generate_until", "METRIC": "exact_match"}
WRITTEN["TARGET"] = '"red"\ngeneration_kwargs: {until: ["."], do_sample: false, max_gen_toks: 4}'
STAGES = ("sft", "dpo", "grpo")
SETTINGS = {"max_steps": 2, "sequence_length": 64, "gradient_accumulation": 2, "per_device_batch_size": 2}


def write_project(folder: Path) -> Path:
    """Write base, records, two tasks and a recipe that trains on conversations, on pairs and on answers of its own."""
    write_base(folder / "base")
    asked = [{"question": f"one {word}", "answer": "[a-p]", "match": "regex"} for word in WORDS]
    files: dict[str, list[Any]] = {
        "sft": example_records("conversations"), "dpo": example_records("preferences"), "grpo": asked,
        "colours": [{"question": f"{word}?", "label": index % 2} for index, word in enumerate(WORDS[:4])],
    }  # fmt: skip
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    tasks = {}
    for name, words in (("chosen", CHOSEN), ("written", WRITTEN)):
        text = CHOOSE.replace("FOLDER", str(folder)).replace("colours\nd", f"{name}\nd")
        for word, value in words.items():
            text = text.replace(word, value)
        (folder / f"{name}.yaml").write_text(text)
        tasks[name] = {"task": str(folder / f"{name}.yaml"), "role": "guard", "metric": words["METRIC"], "max_drop": 1}
    policy = {"k": 4, "temperature": 3.0, "max_tokens": 16, "reward": {"regex": 1.0, "ended": 0.5}, "beta": 0.05}
    stages: dict[str, Any] = {
        "sft": SETTINGS | {"eval_share": 0.3, "neftune_alpha": 5, "gate": {"tasks": tasks}},
        "dpo": SETTINGS | {"eval_share": 0.3, "gate": "none"},
        "grpo": SETTINGS | policy | {"gate": "none"},
    }
    for name, settings in stages.items():
        settings["data"] = str(folder / f"{name}.jsonl")
    recipe = {"model": {"path": str(folder / "base"), "dtype": "bfloat16"}, "stages": stages}
    (folder / "recipes").mkdir()
    (folder / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def run(folder: Path, *command: str) -> dict[str, list[dict[str, Any]]]:
    """Run the recipe by a command; return what its stages reported of each step."""
    output = folder / command[0]
    words = [sys.executable, "-m", *command, "recipe=tiny", f"output_root={output}"]
    where = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = warm.run(words, cwd=folder, env={**os.environ, **where})
    assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = output.glob("*/metrics.jsonl")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {name: [step for step in steps if step["stage"] == name] for name in STAGES}


def test_a_run_without_float64_on_its_device_gives_the_numbers_of_the_cpu(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    found = run(folder, "tests.support.metal")
    expected = run(folder, "posttrain", *(f"{name}.compute_dtype=float32" for name in STAGES))
    for stage in ("sft", "dpo"):
        for key in ("loss", "grad_norm", "eval_loss"):
            pairs = [
                (one[key], other[key]) for one, other in zip(found[stage], expected[stage], strict=True) if key in one
            ]
            assert pairs, key
            assert [one for one, _ in pairs] == pytest.approx([other for _, other in pairs], rel=1e-3), (stage, key)
    assert [step["answers"] for step in found["grpo"]] == [step["answers"] for step in expected["grpo"]]


def test_the_environment_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, metal, expected in (
        ("auto", False, "cpu"),
        ("", True, "mps"),
        ("mps", True, "mps"),
        ("cpu", True, "cpu"),
    ):
        monkeypatch.setenv(device.VARIABLE, word)
        monkeypatch.setattr(device, "has_metal", lambda metal=metal: metal)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert device.default_device() == torch.device(expected)


@pytest.mark.parametrize(("word", "told"), [("mps", "no device 'mps'"), ("metal", "Available: auto, cpu, cuda, mps")])
def test_a_device_that_is_not_there_is_told(word: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VARIABLE, word)
    monkeypatch.setattr(device, "has_metal", lambda: False)
    with pytest.raises(BadInput, match=told):
        device.default_device()
