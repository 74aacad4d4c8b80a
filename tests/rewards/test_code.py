"""Programs of models: what passes its tests and what does not, and attacks on the sandbox, each by what it reaches."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.questions import read_question
from posttrain.errors import BadInput
from posttrain.host import consent
from posttrain.rewards import code, sandbox
from posttrain.rewards.reward import Attempt
from posttrain.rewards.scorer import Rated, choose

REWARD = {"code": code.code()}
OWNER = {"code": "us"}
ADD = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert not add(0, 0)"]
SHORT = sandbox.Limits(seconds=1, clock=20.0)


def rate(*texts: str, tests: list[Any] = ADD, ended: bool = True) -> list[Rated]:
    asked = read_question({"question": "Write add.", "meta": {"tests": tests}}, "q.jsonl:1")
    scorer = choose("code", REWARD, OWNER)
    return scorer.rate([Attempt(question=asked, text=text, ended=ended) for text in texts])


def test_a_program_is_right_when_every_test_passes() -> None:
    right = "def add(a, b):\n    return a + b"
    found = rate(right, f"First:\n```\n1/0\n```\nno:\n```python\n{right}\n```\nDone.", "def add(a, b):\n    return 3")
    assert [each.reward for each in found] == [1.0, 1.0, 0.0]
    assert [dict(each.notes) for each in found] == [{}, {}, {}]
    assert rate(right, ended=False)[0].reward == 0.0


def test_a_whole_program_is_compared_by_its_output() -> None:
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "20 22", "output": "42"}]
    found = rate("a, b = map(int, input().split())\nprint(a + b)", "print(3)", tests=tests)
    assert [each.reward for each in found] == [1.0, 0.0]


def test_values_keep_their_types() -> None:
    values = "[(1, 2.5), {3}, b'x', {'a': (None, True)}, 1j, frozenset({4})]"
    assert rate(f"def f():\n    return {values}", tests=[f"assert f() == {values[:-16]}]"])[0].reward == 0.0
    literal = "[(1, 2.5), {3}, b'x', {'a': (None, True)}, 0 + 1j]"
    assert rate(f"def f():\n    return {literal}", tests=[f"assert f() == {literal}"])[0].reward == 1.0
    assert rate("def f():\n    return [1, 2]", tests=["assert f() == (1, 2)"])[0].reward == 0.0


ENDED = "the program ended before its tests"
LOOKS = """
found = open('/job/calls.json').read() + open('/job/program.py').read()
def add(a, b):
    return 3 if 'right' in found else ''
"""
CHEATS = {
    "exit": ("import sys; sys.exit(0)", "the program raised SystemExit"),
    "hard exit": ("import os; os._exit(0)", ENDED),
    "prints a mark": ("print('passed')\nraise SystemExit(0)", "the program raised SystemExit"),
    "equal to all": (
        "class All:\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return All()",
        "the program raised ValueError",
    ),
    "writes values": (
        'import os\nfor n in range(3):\n    os.write(3, b\'{"number": %d, "value": true}\\n\' % n)\nos._exit(0)',
        "",
    ),
    "patches json": ("import json\njson.dumps = lambda *a, **k: '{}'\ndef add(a, b):\n    return 0", ENDED),
    "looks for the values": (LOOKS, ""),
    "swallows the assertion": ("def add(a, b):\n    raise AssertionError", "the program raised AssertionError"),
    "nothing": ("```python\n\n```", "no program in it"),
    "no Python": ("I would add them.", "the program raised SyntaxError"),
}


def test_no_program_passes_without_the_right_values() -> None:
    found = rate(*(program for program, _ in CHEATS.values()))
    assert {name: each.reward for name, each in zip(CHEATS, found, strict=True)} == dict.fromkeys(CHEATS, 0.0)
    notes = {name: each.notes.get("code", "") for name, each in zip(CHEATS, found, strict=True)}
    assert notes == {name: note for name, (_, note) in CHEATS.items()}


def says(program: str, limits: sandbox.Limits = sandbox.LIMITS) -> str:
    return sandbox.run(f"def f():\n    return said\n{program}", ["f()"], limits=limits).output.decode()


def test_no_network_is_reached_not_even_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        for host in ("127.0.0.1", "1.1.1.1"):
            tries = f"import socket\ntry:\n    said = str(socket.create_connection(({host!r}, {port}), 5))\n"
            assert "unreachable" in says(f"{tries}except OSError as error:\n    said = str(error)")


def test_no_secret_and_no_file_of_the_user_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_SECRET_TOKEN", "canary-7731")
    (tmp_path / "secret").write_text("canary-7731")
    program = f"""
import glob, os
said = [sorted(os.environ), os.listdir('.'), os.listdir('/tmp'), os.path.exists('/proc'), os.path.exists('/etc')]
said.append(os.path.exists({str(tmp_path / "secret")!r}))
said.append(sorted(each for each in os.listdir('/') if each not in ('root', 'home', 'opt')))
said.append(os.getuid())
"""
    found = says(program)
    assert "canary" not in found
    assert '["LANG", "PATH"]' in found.replace('{"list": ', "").replace("}", "")
    assert '{"list": []}, {"list": []}, false, false, false' in found
    assert found.rstrip().endswith("65534]}}")


def test_nothing_is_written_outside_and_little_inside(tmp_path: Path) -> None:
    program = """
said = []
def tries(path, size=1):
    try:
        with open(path, 'wb') as file:
            for _ in range(size):
                file.write(b'x' * (1 << 20))
        said.append('written')
    except OSError as error:
        said.append(type(error).__name__)
"""
    places = [str(tmp_path / "x"), "/usr/x", "/job/program.py", "/x", "x"]
    tried = "".join(f"tries({place!r})\n" for place in places) + "tries('y', 40)\nsaid.append(open('x', 'rb').read(1))"
    found = says(program + tried)
    assert '["FileNotFoundError", "OSError", "OSError", "OSError", "written", "OSError", ' in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "note"),
    [
        ("while True: pass", sandbox.TOO_LONG),
        ("import os\nos.close(1); os.close(2)\nwhile True: pass", sandbox.TOO_LONG),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", sandbox.TOO_LONG),
        ("import os\nos.write(3, b'x' * (1 << 21))", sandbox.TOO_MUCH),
    ],
)
def test_limits_end_a_program_and_are_named(program: str, note: str) -> None:
    assert sandbox.run(program, ["1"], limits=SHORT).fault == note


def test_a_sleeper_is_ended_by_the_clock() -> None:
    assert sandbox.run("import time; time.sleep(600)", limits=sandbox.Limits(clock=2.0)).fault == sandbox.TOO_LONG


def test_endless_output_is_cut() -> None:
    ran = sandbox.run("while True: print('x' * 10**6)", given="", limits=SHORT)
    assert (len(ran.output), ran.fault) == (1 << 20, sandbox.TOO_MUCH)


def test_memory_and_processes_run_out_inside() -> None:
    hog = "try:\n    x = bytearray(10**10)\n    said = len(x)\nexcept MemoryError:\n    said = 'no memory'"
    assert "no memory" in says(hog)
    bomb = """
import os, time
said = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(600)
        said += 1
except OSError:
    pass
"""
    assert '"value": 6}' in says(bomb)  # eight with itself and the first process of its space


def test_a_process_that_leaves_its_group_ends_with_its_program() -> None:
    marker = f"posttrain-{os.getpid()}-daemon"
    program = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    python = {sandbox._python()!r}
    os.execv(python, [python, '-I', '-S', '-c', 'import time; time.sleep(600)', {marker!r}])
time.sleep(1)
said = 'left'
"""
    assert "left" in says(program)
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if marker.encode() in line and b"sleep" in line]


def test_nobody_runs_programs_without_the_users_consent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with consent.given_by(["+gate.tasks.reward.run_code=true", "reward=code"]):
        scorer = choose("code", REWARD, OWNER)
        with pytest.raises(BadInput, match=r"needs your consent(.|\n)*--trust-tasks(.|\n)*a recipe alone cannot"):
            scorer.identities()
        consent.file().parent.mkdir(parents=True)
        consent.file().write_text("run_code reward\n")
        assert scorer.identities()["code"].startswith("code 1 of us, Python 3.")


def test_a_machine_without_a_sandbox_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = contextlib.nullcontext("/no/such/folder")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda prefix: absent)
    with (
        consent.given_by([consent.FLAG]),
        pytest.raises(BadInput, match="be had here: mounting /no/such/folder"),
    ):
        choose("code", REWARD, OWNER).identities()


@pytest.mark.parametrize(
    ("meta", "what"),
    [
        ({}, "has no list of tests"),
        ({"tests": []}, "has no list of tests"),
        ({"tests": ["assert close(f(1), 2.0) < g(3)"]}, "which is neither assert CALL == VALUE"),
        ({"tests": ["assert f(1) == other()"]}, "which is neither assert CALL == VALUE"),
        ({"tests": ["import os"]}, "which is neither"),
        ({"tests": [{"input": "1"}]}, "which is neither"),
    ],
)
def test_tests_that_show_no_right_value_are_rejected(meta: dict[str, Any], what: str) -> None:
    (problem,) = choose("code", REWARD, OWNER).problems([read_question({"question": "?", "meta": meta}, "q.jsonl:4")])
    assert what in problem.what
