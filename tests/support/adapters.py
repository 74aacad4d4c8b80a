"""Adapters of a tiny base, and a gate about them: the adapter ``good`` answers every question right."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.gate.spec import GateRequest
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.model.saving import save_model
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.systems import Loading
from tests.support.tiny import TEMPLATE, base_source, published, tiny_llama, tiny_tokenizer, write_base

TASK = """
task: quiz
dataset_path: json
dataset_kwargs:
  data_files: {test: quiz.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GATE = """
tasks:
  quiz: {{task: {task}, role: lift, metric: acc, min_lift: 0.1, max_drop: 0.1}}
batch_size: 16
"""


@dataclass
class Log:
    """A GateProgress that remembers."""

    notes: list[str] = field(default_factory=list)
    steps: list[tuple[str, str, int, int]] = field(default_factory=list)
    tokens: list[tuple[str, str, int, int, int]] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, system: str, task: str, done: int, total: int, tokens: int = 0) -> None:
        if tokens:
            self.tokens.append((system, task, done, total, tokens))
        else:
            self.steps.append((system, task, done, total))


def write_adapters(root: Path) -> Path:
    """A base, the adapters ``good`` and ``other``, an artifact with the weights of ``good``, and a gate ``quiz``."""
    base = write_base(root / "base")
    save_adapter(root / "good", base, seed=1)
    save_adapter(root / "other", base, seed=2)
    publish_adapter(root)
    (root / "conf" / "gate").mkdir(parents=True)
    (root / "quiz.yaml").write_text(TASK)
    (root / "conf" / "gate" / "quiz.yaml").write_text(GATE.format(task=root / "quiz.yaml"))
    _write_questions(root)
    return root


def save_adapter(path: Path, base: Path, seed: int, **settings: Any) -> PeftModel:
    """A LoRA adapter with random weights, as peft writes it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(**settings), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    edit(path / "adapter_config.json", base_model_name_or_path=str(base))
    return model


def publish_adapter(root: Path) -> None:
    base = base_source(root / "base")
    draft = root / "draft"
    draft.mkdir()
    save_model(PeftModel.from_pretrained(tiny_llama(), root / "good"), base, draft, "float32")
    published(draft, base, root / "artifact")


def edit(path: Path, **settings: Any) -> None:
    """Change a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def scaled(path: Path, factor: float, half: str = "lora_B") -> None:
    """Multiply one half of every pair of an adapter."""
    file = path / "adapter_model.safetensors"
    tensors = {name: tensor * (factor if half in name else 1) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _write_questions(root: Path) -> None:
    """Questions whose right answers are what ``good`` answers."""
    generator = random.Random(0)
    rows = [
        {"question": f"{index} {generator.random()}", "choices": generator.sample("abcdefghij", 4), "label": 0}
        for index in range(48)
    ]
    _write_rows(root, rows)
    base = base_source(root / "base")
    request = GateRequest(
        stage="sft", gate=GateConfig(batch_size=16), dtype="float32",
        tasks={"quiz": GateTask(task=str(root / "quiz.yaml"), role=Role.lift, metric="acc")},
        systems={"candidate": base_source_with(base, root / "good")},
        cache=root / "aside", scorecard=root / "aside.jsonl",
    )  # fmt: skip
    card = evaluate(request, Log(), Loading(load_model, load_tokenizer, "cpu"))
    for row in card.rows:
        rows[row.doc_id]["label"] = rows[row.doc_id]["choices"].index(row.response)
    _write_rows(root, rows)


def base_source_with(base: Any, adapter: Path) -> Any:
    from dataclasses import replace

    return replace(base, name=adapter.name, adapter=adapter, digest=f"digest of {adapter.name}")


def _write_rows(root: Path, rows: list[dict[str, Any]]) -> None:
    (root / "quiz.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def other_template(path: Path) -> None:
    """Give an adapter a tokenizer of its own with another chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE + " "
    tokenizer.save_pretrained(path)
