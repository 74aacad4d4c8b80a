"""What does not need a POSIX system works without one: a process whose modules lack what Windows lacks."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.fakes import write_project

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted(path for path in (*(ROOT / "posttrain").rglob("*.py"), *ROOT.glob("plugins/*/posttrain_*/**/*.py")))
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog")
"""Modules that only POSIX systems have."""
SYSTEM = ("fork", "getuid", "geteuid", "sysconf", "pread", "sched_getaffinity", "getpgid", "killpg", "setsid", "sync")
SIGNALS = ("SIGKILL", "SIGALRM", "SIGVTALRM", "SIGCHLD", "SIGHUP", "SIGUSR1", "setitimer", "alarm", "pthread_sigmask")
WITHOUT = f"""
import json, os, signal, sys, types
for name in {MODULES}:
    sys.modules[name] = None
for name in {SYSTEM}:
    if hasattr(os, name):
        delattr(os, name)
for name in {SIGNALS}:
    delattr(signal, name)
machine = types.ModuleType("psutil")  # that of another system, which asks Windows
machine.virtual_memory = lambda: types.SimpleNamespace(total=2**33)
sys.modules["psutil"] = machine
from posttrain import cli
sys.exit(max(cli.answer(words) for words in json.loads(sys.argv[1])))
"""
COMMANDS = (
    ["--help"], ["list"], ["list", "sft"], ["init", "chats.jsonl", "--model", "base"],
    ["plan", "recipe=quickstart"], ["show", "recipe=quickstart"],
)  # fmt: skip


def test_commands_that_train_nothing_need_no_posix(working_folder: Path) -> None:
    write_project(working_folder)
    turns = ({"role": "user", "content": f"a{row}"} for row in range(40))
    lines = [json.dumps({"messages": [turn, {"role": "assistant", "content": "b"}]}) for turn in turns]
    (working_folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-c", WITHOUT, json.dumps(COMMANDS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "quickstart: sft ─► dpo ─► safety" in result.stdout
    assert Path("recipes/chats.yaml").exists()


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from outside_functions(child)


def test_no_module_imports_what_windows_lacks() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in CODE
        for node in outside_functions(ast.parse(path.read_text(encoding="utf-8")))
        for name in names(node)
        if name.split(".")[0] in MODULES
    ]
    assert found == []


def names(node: ast.AST) -> list[str]:
    """Modules that a node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
