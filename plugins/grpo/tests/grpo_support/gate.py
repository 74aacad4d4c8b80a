"""A gate of own questions for the stage."""

from __future__ import annotations

from posttrain.scoring import plugin
from posttrain.testing import Project

ASKED = ("sun", "ice", "fog", "sea", "hay", "gum")
PATTERNS = {"early": "[a-g]", "late": "[q-z]"}
"""Right answers by task."""
SHORT = """
include: {own}
task: short
generation_kwargs: {{until: [], max_gen_toks: 16, do_sample: false}}
"""
"""The task for own questions, with answers that take a tiny model no time."""


def gate_words(project: Project) -> list[str]:
    """Return the words of a gate with two tasks on six questions; write these beside the recipe."""
    (folder,) = plugin.register_eval_tasks()
    task = project.folder / "short.yaml"
    task.write_text(SHORT.format(own=folder / "own_questions.yaml"))
    found = ["grpo.gate.enabled=true"]
    for name, pattern in PATTERNS.items():
        rows = [{"question": f"a {word}", "answer": pattern, "match": "regex"} for word in ASKED]
        data = project.write_records(rows, f"{name}.jsonl")
        found.append(f"+grpo.gate.tasks.{name}={{role: lift, metric: right, task: '{task}', data: '{data}'}}")
    return found
