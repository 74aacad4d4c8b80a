"""A project of tests whose dpo stage has no pairs: its parent answers four questions, and a reward judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.testing import Project

QUESTIONS = [{"question": f"a {word}", "answer": "[a-k]", "match": "regex"} for word in ("red", "blue", "elm", "oak")]


def asking_project(folder: Path) -> Project:
    """Write a project with the questions beside it."""
    found = Project(folder=folder, kind="dpo", settings={"max_steps": 2, "gradient_accumulation": 1}).write()
    found.write_records(QUESTIONS, "questions.jsonl")
    return found


def asking_source(project: Project, **settings: Any) -> str:
    """Return the override by which the parent makes the stage's records."""
    settings = {"questions": str(project.folder / "questions.jsonl"), **settings}
    return f"dpo.data={{on_policy: {{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}}}"
