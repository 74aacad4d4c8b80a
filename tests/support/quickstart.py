"""The quickstart, run once for all processes of the tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import disk

COMMAND = [sys.executable, "-m", "posttrain", "recipe=quickstart"]
PATIENCE = 1500
"""Seconds that a loaded machine may take."""


def finished(factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the quickstart was run, for reading alone: the other processes have the same."""
    session = factory.getbasetemp()
    if session.name.startswith("popen-"):  # one of several processes, each with a folder of its own in the session's
        session = session.parent
    folder, said = session / "quickstart", session / "quickstart.out"
    with (session / "quickstart.lock").open("w") as stream:
        disk.lock(stream)
        if not said.exists():  # written last: a process may have died in the middle
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
            assert done.returncode == 0, done.stderr
            said.write_text(done.stdout)
    assert "quickstart: done" in said.read_text()
    return folder


def copied(folder: Path, target: Path) -> Path:
    """Copy the run of ``folder``, with all that is kept beside it, into ``target``; return ``target``."""
    shutil.copytree(folder / "runs", target / "runs", symlinks=True)
    return target
