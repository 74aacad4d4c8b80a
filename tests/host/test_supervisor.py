"""The process that watches over a command: exit codes, signals, terminals, and ends of either process."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.host import activity
from posttrain.host.activity import Activity, Report
from posttrain.run.directory import read_state
from tests.support.command import started

PATIENCE = 600
"""Seconds that a loaded machine may take."""
HEAD = """\
import atexit, os, signal, sys, time
from posttrain.host import activity
from posttrain.host.activity import Activity
from posttrain.host.supervisor import supervise
"""
WAITS = """\
def work():
    heard = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: heard.append(number))
    print(os.getpid(), flush=True)
    end = time.monotonic() + 600
    while not heard and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    print("heard", *map(int, heard), flush=True)
    return 75
"""


def script(body: str) -> list[str]:
    return [sys.executable, "-c", f"{HEAD}{body}\nsys.exit(supervise(work))"]


def run(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(script(body), capture_output=True, text=True, check=False, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def work():\n    return 0", 0),
        ("def work():\n    return 75", 75),
        ("def work():\n    sys.exit(4)", 4),
        ("def work():\n    sys.exit('no')", 1),
        ("def work():\n    raise RuntimeError('a bug')", 1),
        ("def work():\n    atexit.register(os._exit, 9)\n    return 3", 3),
        ("def work():\n    atexit.register(os.kill, os.getpid(), 11)\n    return 5", 5),
    ],
)
def test_the_exit_code_is_the_one_that_the_command_came_to(body: str, code: int) -> None:
    assert run(body).returncode == code


def test_what_a_bug_raises_is_shown() -> None:
    assert "RuntimeError: a bug" in run("def work():\n    raise RuntimeError('a bug')").stderr


def test_a_death_outside_of_every_plugin_is_nobodys_but_ours() -> None:
    result = run("def work():\n    os.kill(os.getpid(), signal.SIGSEGV)")
    assert result.returncode == 1
    assert "something in posttrain or below it took the process down: SIGSEGV" in result.stderr
    assert "memory runs out" in run("def work():\n    os.kill(os.getpid(), signal.SIGKILL)").stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_work_once(number: signal.Signals) -> None:
    with started(script(WAITS), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) != process.pid
        process.send_signal(number)
        assert process.stdout.read() == f"heard {int(number)}\n"
    assert process.returncode == 75


def test_control_c_on_a_terminal_reaches_the_work_once() -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, script(WAITS))
    shown = os.read(terminal, 100)
    while b"\n" not in shown:
        shown += os.read(terminal, 100)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    rest = b""
    while b"heard" not in rest:
        rest += os.read(terminal, 100)
    assert rest.split(b"heard")[1].split() == [b"2"]


def test_control_c_before_the_work_begins_and_while_it_answers_is_told_once() -> None:
    begun = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {2})\nsignal.raise_signal(2)\n"
    result = run(f"{begun}def work():\n    print('begun')")
    told = "error: stopped by Ctrl-C\nRun the same command again to resume.\n"
    assert (result.returncode, result.stdout, result.stderr) == (75, "", told)
    result = run("def work():\n    try:\n        raise OSError\n    except OSError:\n        os.kill(os.getpid(), 2)")
    assert (result.returncode, result.stderr) == (75, told)


def test_a_signal_that_nobody_handles_is_an_interruption() -> None:
    body = "def work():\n    print('ready', flush=True)\n    time.sleep(30)\n    return 0"
    with started(script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        _, said = process.communicate()
    assert process.returncode == 75
    assert "stopped by SIGTERM" in said


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"


def eventually(holds: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not holds():
        time.sleep(0.02)
    return holds()


def test_nothing_runs_on_when_the_command_is_killed() -> None:
    with started(script(WAITS), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert not gone(worker)
        process.kill()
        process.wait()
        assert eventually(lambda: gone(worker))


def hanging(seconds: float, body: str) -> str:
    call = f"Activity(plugin='slow', origin='slow 1', call='run', silence_limit={seconds})"
    return f"def work():\n    with activity.calling({call}):\n        {body}\n    return 0"


def test_signs_of_life_keep_a_call_alive_and_silence_ends_it() -> None:
    alive = hanging(3.0, "for _ in range(20): time.sleep(0.2); activity.sign_of_life()")
    assert run(alive).returncode == 0
    result = run(hanging(0.5, "time.sleep(60)"))
    assert result.returncode == 6
    assert "plugin slow (slow 1) in run: it hung and had to be ended after 0.5 s without a sign" in result.stderr


def test_time_in_which_all_of_it_was_stopped_does_not_count() -> None:
    silent = "while time.monotonic() < end: time.sleep(0.05)"  # one long sleep may begin again after the stop
    body = hanging(5.0, f"end = time.monotonic() + 6.5; print(os.getpid(), flush=True)\n        {silent}")
    with started(script(body), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for each in (process.pid, worker):
                os.kill(each, number)
            time.sleep(5.5 if number == signal.SIGSTOP else 0)
    assert process.returncode == 0


def test_a_process_without_a_supervisor_tells_nobody_and_a_torn_record_says_nothing() -> None:
    with activity.calling(Activity(plugin="any", origin="any 1", call="run", silence_limit=None)):
        activity.sign_of_life()
    assert activity.read(b'{"signs": 3, "co') == Report()


WRITES = """\
from pathlib import Path
from posttrain.run.directory import RunDirectory, RunState, StageState

def work():
    path = Path(sys.argv[1])
    path.mkdir()
    stages = [StageState(name="sft", kind="sft", state="promoted"), StageState(name="dpo", kind="dpo", state="running")]
    run = RunDirectory(path, RunState(recipe="any", stages=stages))
    run.save()
    with activity.running(path):
        {within}
    {after}
"""


@pytest.mark.parametrize(
    ("within", "after", "states"),
    [
        ("os._exit(7)", "", ("failed", "promoted", "failed")),
        ("os.kill(os.getpid(), signal.SIGKILL)", "", ("failed", "promoted", "failed")),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)", "", ("interrupted", "promoted", "interrupted")),
        ("run.state.end('done'); run.save(); os._exit(7)", "", ("done", "promoted", "done")),
        ("run.path.joinpath('run.json').write_text('torn'); os._exit(7)", "", None),
        ("pass", "os._exit(7)", ("running", "promoted", "running")),  # it is not this run that the process died in
    ],
)
def test_the_end_of_a_run_is_written_down_for_a_process_that_died(
    tmp_path: Path, within: str, after: str, states: tuple[str, ...] | None
) -> None:
    path = tmp_path / "a run called “ä”"
    body = WRITES.format(within=within, after=after)
    result = subprocess.run([*script(body), str(path)], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert result.returncode == (75 if "SIGTERM" in within else 1)
    assert "Traceback" not in result.stderr
    if states is None:
        assert "the end of the run could not be recorded" in result.stderr
        return
    state = read_state(path)
    assert (state.state, *(stage.state for stage in state.stages)) == states


def test_a_run_that_another_process_goes_on_with_is_left_to_it(tmp_path: Path) -> None:
    holder = "import fcntl; lock = open(path / '.lock', 'a'); fcntl.flock(lock, fcntl.LOCK_EX)"
    within = f"{holder}; os.fork() or (os.close(1), os.close(2), time.sleep(60), os._exit(0)); os._exit(7)"
    body = WRITES.format(within=within, after="")
    result = subprocess.run([*script(body), str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert read_state(tmp_path / "run").state == "running"
