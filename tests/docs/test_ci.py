"""The workflow and the pre-merge example of docs/ci.md, run step by step on a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
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
