"""A gate of own questions for the stage."""

from __future__ import annotations

from posttrain.scoring import plugin
from posttrain.testing import Project

ASKED = ("sun", "ice", "fog", "sea", "hay", "gum")
PATTERNS = {"early": "[a-g]", "late": "[q-z]"}
"""Right answers by task."""


def gate_words(project: Project) -> list[str]:
    """Return the words of a gate with two tasks on six questions; write these beside the recipe."""
    (folder,) = plugin.register_eval_tasks()
    found = ["grpo.gate.enabled=true"]
    for name, pattern in PATTERNS.items():
        rows = [{"question": f"a {word}", "answer": pattern, "match": "regex"} for word in ASKED]
        data, task = project.write_records(rows, f"{name}.jsonl"), folder / "own_questions.yaml"
        found.append(f"+grpo.gate.tasks.{name}={{role: lift, metric: right, task: '{task}', data: '{data}'}}")
    return found
