"""What is installed from the wheel is whole: no checkout is needed beside it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_code_plugins_configuration_and_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {
        "posttrain/cli.py",
        "posttrain/report/templates/page.html",
        "posttrain/commands/templates/plugin/pyproject.toml.j2",
        "posttrain/commands/templates/plugin/.github/workflows/test.yml.j2",
        "posttrain/testing/conformance.py",
        "posttrain_preference/objectives.py",
        "posttrain_safety/conf/gate/safety_default.yaml",
        "posttrain_safety/tasks/harmless.jsonl",
        "posttrain_safety/tasks/scoring.py",
        "posttrain/_conf/config.yaml",
        "posttrain/_recipes/quickstart.yaml",
        "posttrain/_recipes/quickstart/base/model.safetensors",
        "posttrain/_recipes/quickstart/tasks/towns_questions.jsonl",
    }
    assert not [name for name in names if "__pycache__" in name or ("/tests/" in name and not name.endswith(".j2"))]


def test_an_unpacked_wheel_lists_and_plans(wheel: Path, working_folder: Path) -> None:
    zipfile.ZipFile(wheel).extractall(working_folder / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(working_folder / 'site')!r})\n"
        "from posttrain import cli\n"
        "assert 'site' in cli.__file__\n"
        "cli.dispatch(['list']); cli.dispatch(['plan', 'recipe=quickstart'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart: sft ─► dpo ─► safety" in result.stdout
    assert str(working_folder / "site") in result.stdout
