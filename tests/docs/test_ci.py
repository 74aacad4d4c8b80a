"""The workflow and the pre-merge example of docs/ci.md, run step by step on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain import cli
from tests.support.adapters import scaled, write_adapters

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def block(language: str) -> str:
    (found,) = blocks(language)
    return found


GITHUB, GITLAB = (yaml.safe_load(found) for found in blocks("yaml"))


def gitlab() -> str:
    """The command of the job on GitLab."""
    (found,) = [line for line in GITLAB["gate"]["script"] if line.startswith("posttrain gate")]
    return str(found)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with adapters, and a gate of the name that the document uses."""
    root = write_adapters(tmp_path_factory.mktemp("project"))
    (root / "conf" / "gate" / "quiz.yaml").rename(root / "conf" / "gate" / "mine.yaml")
    shutil.copytree(root / "good", root / "adapters" / "candidate")
    return root


def shell(script: str) -> int:
    """The exit code of the first command of a script that does not end with 0, the gate being the project's own."""
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        if words and words != ["set", "-e"]:
            assert words[:2] == ["posttrain", "gate"]
            given = ["gate=mine" if word == "gate=quickstart" else word for word in words[2:]]
            with pytest.raises(SystemExit) as ended:
                cli.main(["gate", "--config-dir", "conf", *given])
            if ended.value.code:
                return int(str(ended.value.code))
    return 0


def test_the_workflow_and_the_example_do_what_they_say(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    # the second command of the example makes the baseline that the first one needs
    update = block("sh").splitlines()[-1]
    assert shell(update) == 0
    assert Path("baselines/quickstart.json").exists()
    Path("summary.md").unlink()
    assert shell(gitlab()) == 0
    assert Path("summary.md").read_text().startswith("### ✅ passed")
    assert Path("gate/comment.md").read_text() == Path("summary.md").read_text()
    assert '<testsuites name="mine" tests="2" failures="0" errors="0"' in Path("gate/junit.xml").read_text()
    assert shell(block("sh")) == 0
    committed = Path("baselines/quickstart.json").read_bytes()
    scaled(Path("adapters/candidate"), -1.0)
    assert shell(gitlab()) == 3
    assert 'failures="0"' not in Path("gate/junit.xml").read_text()
    assert shell(block("sh")) == 3
    assert Path("baselines/quickstart.json").read_bytes() == committed


def test_every_ci_asks_the_same_gate_and_keeps_what_it_wrote() -> None:
    (used,) = [step["with"] for step in GITHUB["jobs"]["gate"]["steps"] if "OWNER/posttrain" in step.get("uses", "")]
    assert set(used) <= set(ACTION["inputs"])
    words = set(shlex.split(gitlab()))
    assert {f"{name}={used[name]}" for name in ("adapter", "gate", "baseline")} <= words
    assert set(shlex.split(block("groovy").split("sh 'posttrain")[1].split("'")[0])) == words - {"posttrain"}
    assert GITHUB["jobs"]["gate"]["permissions"]["pull-requests"] == "write"
    kept = GITLAB["gate"]["artifacts"]
    assert kept["when"] == "always"
    assert GITLAB["gate"]["cache"]["paths"] == ["runs/cache"]
    written = [word.partition("=")[2] for word in words if word.startswith(("junit=", "markdown="))]
    assert all(path.startswith(f"{kept['paths'][0]}/") for path in written)
    assert kept["reports"]["junit"] in written


MARKER = "<!-- posttrain gate quickstart -->"
CURL = """#!/bin/bash
for word in "$@"; do printf '%s\\n' "$word"; done >> calls.txt
case "${!#}" in
  */user) printf '{"id": 7}';;
  *"page=1") cat first.json;;
  *"page=2") cat second.json;;
  *"page="*) printf '[]';;
esac
"""
"""A stand-in for curl, which answers by the last word, the address."""


def note(number: int, body: str, author: int = 7) -> dict[str, object]:
    return {"id": number, "body": body, "author": {"id": author}}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], ["--data-urlencode", "body@gate/note.md", "api/projects/1/merge_requests/2/notes"]),
        (
            [note(41, f"{MARKER}\n### verdict"), note(42, f"{MARKER}\n### verdict")],
            ["--request", "PUT", "--data-urlencode", "body@gate/note.md", "api/projects/1/merge_requests/2/notes/41"],
        ),
    ],
)
def test_gitlab_has_one_note_that_is_updated(working_folder: Path, found: list[object], words: list[str]) -> None:
    (script,) = GITLAB["gate"]["after_script"]
    Path("bin").mkdir()
    for name, text in (("curl", CURL), ("python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')):
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o755)
    strange = [note(3, f"{MARKER}\nof another user", author=8), note(4, "quotes \" and ' and $(touch broken)")]
    Path("first.json").write_text(json.dumps(strange))
    Path("second.json").write_text(json.dumps(found))
    variables = {"CI_API_V4_URL": "api", "CI_PROJECT_ID": "1", "CI_MERGE_REQUEST_IID": "2", "GATE_TOKEN": "secret"}
    given = {**os.environ, **variables, "PATH": f"{working_folder / 'bin'}:{os.environ['PATH']}"}

    def run() -> None:
        done = subprocess.run(["sh", "-e", "-c", script], env=given, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    run()
    assert not Path("calls.txt").exists()  # a gate that was not asked has no comment
    Path("gate").mkdir()
    Path("gate/comment.md").write_text("### verdict\n")
    run()
    assert Path("calls.txt").read_text().splitlines()[-len(words) - 1 :] == ["PRIVATE-TOKEN: secret", *words]
    assert Path("gate/note.md").read_text() == f"{MARKER}\n### verdict\n"
    assert not Path("broken").exists()
