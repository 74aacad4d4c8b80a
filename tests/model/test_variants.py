"""Every variant, the whole way: a recipe with a real gate, the same command again, merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.artifact import verify
from tests.support.command import main
from tests.support.tiny import TURNS, tiny_tokenizer, write_base

RECIPE = """\
defaults:
  - /stage@sft: sft
  - _self_
model: {path: base, dtype: float32, added_tokens: ["<|turn|>"]}
sft:
  data: train.jsonl
  sequence_length: 96
  max_steps: 4
  gradient_accumulation: 2
  lr: 1e-2
  lora: {r: 4, alpha: 8}
  gate: {tasks: {quiz: {role: lift, metric: acc, task: quiz.yaml, chat: true, min_lift: -1.0}}}
"""
QUIZ = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def project(request: pytest.FixtureRequest, working_folder: Path) -> Path:
    tied: bool = request.param
    write_base(working_folder / "base", hidden_size=64, vocab_size=104, tie_word_embeddings=tied)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(working_folder / "base")
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    (working_folder / "quiz.yaml").write_text(QUIZ)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
    (working_folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiz = [{"question": f"Is it {i}?", "choices": [f"It is {i}.", "no"], "label": 0} for i in range(6)]
    (working_folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    return working_folder


@pytest.mark.parametrize("variant", ["lora", "qlora", "full"])
def test_a_recipe_is_trained_scored_continued_and_merged(
    project: Path, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("recipe=mine", f"variant={variant}", "sft.lora.dora=true", "sft.lr=1e-2")
    assert main(*words) == 0
    (state,) = project.glob("runs/*/run.json")
    (stage,) = json.loads(state.read_text())["stages"]
    folder = state.parent / "stages" / "sft"
    artifact = verify(folder / "artifact")
    rows = [json.loads(line) for line in (folder / "scorecard.jsonl").read_text().splitlines()]
    scored = {row["system"]: row["digest"] for row in rows}
    assert (stage["state"], scored["candidate"]) == ("promoted", artifact.digest)
    assert len(rows) == 2 * 6
    assert artifact.manifest.added_tokens == ("<|turn|>",)
    assert artifact.manifest.quantization == ("nf4" if variant == "qlora" else None)
    assert not (artifact.path / "probe.safetensors").exists()
    capsys.readouterr()
    assert main(*words) == 0
    assert "already done" in capsys.readouterr().err
    assert main("merge", str(artifact.path), "merged") == (2 if variant == "full" else 0)
