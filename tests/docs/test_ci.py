"""The workflow and the pre-merge example of docs/ci.md, run step by step on a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain import cli
from tests.support.adapters import scaled, write_adapters

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)
    return str(found)


def steps() -> list[dict[str, Any]]:
    return list(yaml.safe_load(block("yaml"))["jobs"]["gate"]["steps"])


def runs() -> list[str]:
    """The commands of the workflow, but that which installs posttrain."""
    return [step["run"] for step in steps() if "run" in step and not step["run"].startswith("pip install")]


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
    assert [shell(run) for run in runs()] == [0]
    assert Path("summary.md").read_text().startswith("### ✅ passed")
    assert Path("gate/comment.md").read_text() == Path("summary.md").read_text()
    assert '<testsuites name="mine" tests="2" failures="0" errors="0"' in Path("gate/junit.xml").read_text()
    assert shell(block("sh")) == 0
    committed = Path("baselines/quickstart.json").read_bytes()
    scaled(Path("adapters/candidate"), -1.0)
    assert [shell(run) for run in runs()] == [3]
    assert 'failures="0"' not in Path("gate/junit.xml").read_text()
    assert shell(block("sh")) == 3
    assert Path("baselines/quickstart.json").read_bytes() == committed


def test_the_workflow_keeps_what_the_gate_wrote() -> None:
    cached = next(step["with"]["path"] for step in steps() if step.get("uses", "").startswith("actions/cache@"))
    kept = next(step for step in steps() if step.get("uses", "").startswith("actions/upload-artifact@"))
    assert cached == "runs/cache"
    assert kept["if"] == "always()"
    for word in " ".join(runs()).split():
        if word.startswith(("junit=", "markdown=")):
            assert word.partition("=")[2].startswith(f"{kept['with']['path']}/")
