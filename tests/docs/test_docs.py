"""What the documents say is what the code does: the page of hooks, and the tutorial."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from posttrain import hookspecs
from tests.support.generators import DOCS, load_generator


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator("hooks")


def test_the_page_of_hooks_is_current(generator: ModuleType) -> None:
    assert (DOCS / "hooks.md").read_text(encoding="utf-8") == generator.page(), "run make docs"


def test_every_hook_is_documented_with_its_signature_and_used_by_a_shipped_plugin(generator: ModuleType) -> None:
    page = (DOCS / "hooks.md").read_text(encoding="utf-8")
    declared = {name for name, item in vars(hookspecs).items() if hasattr(item, "posttrain_spec")}
    assert declared == {hook.name for hook in generator.hooks()}
    for name in declared:
        arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
        _, _, entry = page.partition(f"### {name}\n")
        assert entry.replace(" ", "").startswith(f"\n```python\ndef{name}("), name
        for argument in filter(None, arguments.split(", ")):
            assert f"{argument}:" in entry.split("```")[1]
    for hook in generator.hooks():
        assert hook.text, hook.name
        assert hook.users, f"no shipped plugin uses {hook.name}: delete it"


# --- The tutorial -----------------------------------------------------------------------------------------------------

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's files, written where it says."""
    folder = tmp_path_factory.mktemp("tutorial")
    for _, title, text in BLOCK.findall((DOCS / "tutorial.md").read_text(encoding="utf-8")):
        if title:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.long
def test_the_tutorials_commands_do_what_it_says(tutorial: Path) -> None:
    """As they stand, but that pip installs into a folder of its own and fetches nothing."""
    site = tutorial / "site"
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
        "PIP_TARGET": str(site), "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "false",
    }  # fmt: skip
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    blocks = [commands for language, _, commands in BLOCK.findall(text) if language == "sh"]
    said = ""
    for commands in blocks:
        result = subprocess.run(
            ["bash", "-euc", commands], cwd=tutorial, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        said += result.stdout + result.stderr
    assert len(blocks) == 2
    for expected in ("posttrain-brief 0.1.0", "brief.longest: int = 16", "10 passed", "longer than 16 tokens"):
        assert expected in said
    (state,) = tutorial.glob("posttrain-brief/runs/*/run.json")
    stages = json.loads(state.read_text())["stages"]
    assert [(stage["name"], stage["state"]) for stage in stages] == [("sft", "promoted"), ("brief", "promoted")]


def test_the_tutorials_code_is_in_order(tutorial: Path) -> None:
    plain = ["--isolated", "--no-cache", "--line-length=120", "posttrain-brief"]
    for command in (["check", "--select=E,F,I,B,W"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *plain], cwd=tutorial, check=True)
