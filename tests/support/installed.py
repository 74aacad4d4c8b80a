"""Distributions made on the spot and found as installed ones are, by this process and by those that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import warm


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, str], version: str = "1.0"
) -> None:
    """Put the plugin ``name`` into ``folder``: the module or package ``files``, the first of them its entry point."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    module = next(iter(files)).removesuffix(".py").removesuffix("/__init__")
    record = folder / f"{name}_plugin-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: {version}\n")
    (record / "entry_points.txt").write_text(f"[posttrain]\n{name} = {module}\n")
    make_importable(folder, monkeypatch)


def make_importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put ``folder`` where distributions are looked for."""
    monkeypatch.syspath_prepend(str(folder))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(folder) not in paths:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, paths)]))


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the command line does."""
    return warm.run([sys.executable, "-m", "posttrain", *words], env={**os.environ, **environment})


def listed(**environment: str) -> dict[str, dict[str, str]]:
    """The plugins that ``posttrain list`` shows, by name."""
    result = command("list", "plugins", "--json", **environment)
    assert result.returncode == 0, result.stderr
    return {row["name"]: row for row in json.loads(result.stdout)["plugins"]}
