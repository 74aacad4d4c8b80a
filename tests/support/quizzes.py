"""Small lm_eval tasks of every kind, their data, and adapters of a tiny base with different answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from posttrain.config.schema import GateTask, Role
from tests.support.tiny import tiny_llama, write_base

GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: data/quiz.jsonl, train: data/train.jsonl}}
test_split: test
training_split: train
fewshot_split: train
num_fewshot: {shots}
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 12}}
filter_list:
  - name: first
    filter:
      - {{function: regex, regex_pattern: "([a-z0-9])"}}
      - {{function: take_first}}
  - name: whole
    filter:
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""

CHOOSE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: data/quiz.jsonl, train: data/train.jsonl}}
test_split: test
training_split: train
fewshot_split: train
num_fewshot: {shots}
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""

LIKELIHOOD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: data/quiz.jsonl}}
test_split: test
num_fewshot: {shots}
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{answer}}}}"
process_results: !function scoring.likelihood
metric_list:
  - {{metric: surprise, aggregation: mean, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""

SCORING = """
def likelihood(doc, results):
    (value, greedy), = results
    return {"surprise": -value, "acc": float(greedy)}
"""


METRICS = {"generate": "exact_match", "choose": "acc", "likelihood": "surprise"}
"""Metric of each kind of task."""


def write_quizzes(root: Path, **settings: Any) -> Path:
    """Write a base model with these settings, two adapters with random weights, and task files with their data."""
    write_base(root / "base", **settings)
    for seed, name in enumerate(("candidate", "parent"), start=1):
        save_adapter(root / name, seed, **settings)
    data = root / "data"
    data.mkdir()
    generator = random.Random(0)
    for name, count in (("quiz", 24), ("train", 30)):
        rows = [quiz_row(generator, index) for index in range(count)]
        (data / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (root / "scoring.py").write_text(SCORING)
    for shots in (0, 2):
        for kind, text in (("generate", GENERATE), ("choose", CHOOSE), ("likelihood", LIKELIHOOD)):
            name = f"{kind}{shots}"
            (root / f"{name}.yaml").write_text(text.format(name=name, shots=shots if kind != "likelihood" else 0))
    return root


def gate_task(folder: Path, name: str, **settings: Any) -> GateTask:
    """Return a gate's task for one of the quizzes: a lift, unless the settings say otherwise."""
    kind = name.rstrip("02")
    chosen = {"filter": "first" if kind == "generate" else None, "role": Role.lift, "metric": METRICS[kind], **settings}
    return GateTask(task=str(folder / f"{name}.yaml"), **chosen)


def quiz_row(generator: random.Random, index: int) -> dict[str, Any]:
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(1, 6))) for _ in range(5)]
    return {"question": f"{index} {words[0]}", "answer": words[1][0], "choices": words[1:], "label": index % 4}


def save_adapter(path: Path, seed: int, fill: float | None = None, **settings: Any) -> None:
    """Save a LoRA adapter on every layer; with ``fill``, all of B has that value."""
    model = get_peft_model(
        tiny_llama(**settings), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5) if fill is None else torch.nn.init.constant_(parameter, fill)
    model.save_pretrained(path)
