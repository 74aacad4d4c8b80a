"""The GitHub Action: its file is sound, and its steps run with stand-ins for gh, pip and posttrain."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: dict[str, dict[str, Any]] = {step["name"]: step for step in ACTION["runs"]["steps"]}
STAND_IN = """#!/bin/bash
for word in "$@"; do printf '%s\\n' "$word"; done | sed 's/^/{name} /' >> "$CALLS"
{body}
"""
BODIES = {
    "gh": 'case " $* " in *--paginate*) printf "%s" "$FOUND";; *) exit "$GH";; esac',
    "pip": "exit 0",
    "posttrain": 'mkdir -p gate; printf "### verdict\\n" > gate/comment.md; exit "$VERDICT"',
}


@pytest.fixture
def stand_ins(working_folder: Path) -> Path:
    folder = working_folder / "bin"
    folder.mkdir()
    for name, body in BODIES.items():
        (folder / name).write_text(STAND_IN.replace("{name}", name).replace("{body}", body))
        (folder / name).chmod(0o755)
    return folder


def run(step: str, stand_ins: Path, given: Mapping[str, str], **others: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub does, with ``given`` in place of its expressions."""
    env = {**STEPS[step].get("env", {}), **given}
    assert set(given) <= set(STEPS[step].get("env", {}))
    assert not [value for value in env.values() if "${{" in value]
    path = {"PATH": f"{stand_ins}:{os.environ['PATH']}", "CALLS": "calls.txt", "GITHUB_OUTPUT": "output.txt"}
    script = Path("step.sh")
    script.write_text(STEPS[step]["run"])
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
    return subprocess.run(command, env={**path, **env, **others}, capture_output=True, text=True, check=False)


def calls(name: str) -> list[str]:
    lines = Path("calls.txt").read_text().splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def test_the_file_is_a_composite_action_whose_texts_are_data_to_the_shell() -> None:
    assert ACTION["runs"]["using"] == "composite"
    assert set(ACTION) <= {"name", "description", "branding", "inputs", "outputs", "runs"}
    for step in STEPS.values():
        assert ("uses" in step) != ("run" in step)
        if "run" in step:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"]  # an input in the text of a script is code
    text = json.dumps(ACTION)
    named = set(re.findall(r"inputs\.(\w+)", text))
    assert named == set(ACTION["inputs"])
    ids = {step["id"] for step in STEPS.values() if "id" in step}
    assert set(re.findall(r"steps\.(\w+)\.", text)) <= ids
    assert all(entry["description"] for entry in (*ACTION["inputs"].values(), *ACTION["outputs"].values()))


@pytest.mark.parametrize("code", [0, 3, 4])
def test_the_gate_is_asked_in_these_words_and_the_job_ends_as_it_does(stand_ins: Path, code: int) -> None:
    given = {
        "ADAPTER": "adapters/a b", "GATE": "quickstart", "BASELINE": "b.json", "OUTPUT": "gate",
        "ARGUMENTS": "gate.tasks.mine={data: x y.jsonl}\n\n--trust-tasks\n$(touch broken)\n",
    }  # fmt: skip
    done = run("Gate", stand_ins, given, VERDICT=str(code))
    assert (done.returncode, done.stderr) == (0, "")
    assert calls("posttrain") == [
        "gate", "adapter=adapters/a b", "gate=quickstart", "junit=gate/junit.xml", "markdown=gate/comment.md",
        "baseline=b.json", "gate.tasks.mine={data: x y.jsonl}", "--trust-tasks", "$(touch broken)",
    ]  # fmt: skip
    assert not Path("broken").exists()
    assert Path("output.txt").read_text() == f"code={code}\ncomment=gate/comment.md\n"
    assert run("Verdict", stand_ins, {"CODE": str(code)}).returncode == code


def test_what_is_installed_already_is_left(stand_ins: Path) -> None:
    assert run("Install", stand_ins, {"INSTALL": ""}).returncode == 0
    assert not Path("calls.txt").exists()
    assert run("Install", stand_ins, {"INSTALL": "posttrain==1.0"}).returncode == 0
    assert calls("pip") == ["install", "posttrain==1.0"]


def test_every_action_that_a_step_uses_is_named_by_its_commit() -> None:
    files = [ROOT / "action.yml", *(ROOT / ".github/workflows").glob("*.yml")]
    files += (ROOT / "posttrain/commands/templates").rglob("*.yml.j2")
    used = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert len(used) > len(files)
    for line in used:  # a tag moves, also to code that somebody else put there
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line), line


def test_two_adapters_by_one_gate_keep_their_files_and_their_comment_apart(stand_ins: Path) -> None:
    labels = ["adapters/a", "adapters/b", "adapters/a\nname=other", "ä" * 300]
    for label in labels:
        assert run("Label", stand_ins, {"GATE": "quick start", "LABEL": label}).returncode == 0
    names = Path("output.txt").read_text().splitlines()
    assert len(set(names)) == len(names) == len(labels)
    assert all(re.fullmatch(r"name=posttrain-gate-quick_start-\d+", name) for name in names)


COMMENT = {
    "NAME": "posttrain-gate-quick_start-7",
    "FILE": "gate/comment.md",
    "NUMBER": "7",
    "REPOSITORY": "o/r",
    "GH_TOKEN": "t",
}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("", ["--method", "POST", "repos/o/r/issues/7/comments"]),
        ("41\n42\n", ["--method", "PATCH", "repos/o/r/issues/comments/41"]),
    ],
)
def test_one_comment_is_posted_and_then_updated(stand_ins: Path, found: str, words: list[str]) -> None:
    Path("gate").mkdir()
    Path("gate/comment.md").write_text("### verdict\n")
    done = run("Comment", stand_ins, COMMENT, FOUND=found, GH="0")
    assert (done.returncode, done.stderr) == (0, "")
    asked = calls("gh")
    assert asked[:3] == ["api", "--paginate", "repos/o/r/issues/7/comments"]
    assert asked[-7:] == ["api", "--silent", *words, "-F", "body=@gate/comment.md.body"]
    marker = "<!-- posttrain-gate-quick_start-7 -->"
    assert Path("gate/comment.md.body").read_text() == f"{marker}\n### verdict\n"
    assert f'startswith("{marker}")' in asked[4]


def test_a_token_that_may_not_write_leaves_the_verdict_to_the_gate(stand_ins: Path) -> None:
    Path("gate").mkdir()
    Path("gate/comment.md").write_text("### verdict\n")
    done = run("Comment", stand_ins, COMMENT, FOUND="", GH="1")
    assert done.returncode == 0
    assert "could not be posted" in done.stdout
    Path("gate/comment.md").unlink()
    assert "wrote no comment" in run("Comment", stand_ins, COMMENT, FOUND="", GH="0").stdout
