"""The process with the libraries: what it forks is a process as any other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import warm

ABOUT = """\
import json, os, sys
print(json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "folder": os.getcwd(), "words": sys.argv[1:], "said": sys.stdin.read(),
    "variables": [os.environ.get("MINE"), os.environ.get("PATH")], "path": sys.path[:2],
    "ours": [name for name in sys.modules if name.startswith("posttrain")], "has": "torch" in sys.modules,
    "tasks": len(os.listdir("/proc/self/task")), "files": len(os.listdir("/proc/self/fd")),
}))
"""


def test_a_command_is_a_child_of_its_own(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    options = {"cwd": place, "env": {"MINE": "1", "PYTHONPATH": "/somewhere"}}
    command = [sys.executable, "-c", ABOUT, "a b", "c"]
    with warm.started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:
        told = json.loads(process.communicate("hello")[0])
    assert process.returncode == 0
    assert told == {
        "pid": process.pid, "parent": os.getpid(), "folder": str(place), "words": ["a b", "c"], "said": "hello",
        "variables": ["1", None], "path": ["", "/somewhere"], "ours": [], "has": True, "tasks": 1, "files": 4,
    }  # fmt: skip
    assert warm.run([sys.executable, "-m", "posttrain", "--version"]).stdout.startswith("posttrain ")


@pytest.mark.parametrize(
    ("code", "ended", "said"),
    [
        ("import atexit; atexit.register(print, 'end'); raise SystemExit(7)", 7, "end\n"),
        ("raise SystemExit('no')", 1, ""), ("1 / 0", 1, ""), ("print('all')", 0, "all\n"),
        ("import threading; threading.Timer(0.1, print, ['late']).start()", 0, "late\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)  # fmt: skip
def test_it_ends_as_python_ends(code: str, ended: int, said: str) -> None:
    result = warm.run([sys.executable, "-c", code])
    assert (result.returncode, result.stdout) == (ended, said)
    assert ("ZeroDivisionError" in result.stderr, result.stderr == "no\n") == ("/" in code, "'no'" in code)


def test_signals_reach_it() -> None:
    code = "import time; print('ready', flush=True); time.sleep(600)"
    for number in (signal.SIGTERM, signal.SIGINT):
        with warm.started([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(number)
            assert process.wait(warm.PATIENCE) == -number
