"""Several processes of a stage and all their ways to end: the right error, naming the rank, and nothing left running.

Real processes and signals; torch is in none of them but the last test's.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifact import ModelSource
from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.config.schema import GateConfig
from posttrain.context import StageContext
from posttrain.data.held import digest_records
from posttrain.data.records import Conversation, Text
from posttrain.engine import processes
from posttrain.errors import ArtifactDamaged, BadInput, DiskFailed, Diverged, Interrupted, PluginFailed, PosttrainError
from posttrain.host import consent, plugins
from posttrain.host.plugins import CORE_ORIGIN
from posttrain.launch import group, worker
from posttrain.launch.group import Group, Watch
from posttrain.launch.job import config_of, parent_of, read_job, read_records, write_job
from posttrain.launch.outcome import RankFailed
from posttrain.launch.shape import shape_of
from posttrain.launch.worker import Stop
from posttrain.sft.plugin import register_stages
from posttrain.testing import Recorder
from tests.support.tiny import sft_config

(SFT,) = register_stages()
PROCESSES = Path(__file__).with_name("processes.py")
RECORDS = [
    Conversation(
        messages=({"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}), where="x:1"
    ),
    Text(text="\ud800 alone", where="x:2", unread=("id",)),
]


def context(folder: Path, **given: Any) -> StageContext:
    (folder / "stage").mkdir(exist_ok=True)
    parent = ModelSource(
        name="base", model=folder, adapter=None, tokenizer=folder, chat_template="", digest="0", base="b",
        model_digest="1",
    )  # fmt: skip
    made: dict[str, Any] = {"progress": Recorder(), "stop_requested": lambda: False, **given}
    return StageContext(
        name="mine", config=sft_config(gate=GateConfig()), parent=parent,
        records=RECORDS[:1], eval_records=RECORDS[1:], seed=3,
        dtype="float32", checkpoints=folder / "checkpoints", output=folder / "draft", engine="ddp", **made,
    )  # fmt: skip


def make_group(folder: Path, origin: str = CORE_ORIGIN, **settings: Any) -> Group:
    launch = LaunchConfig(kind=Launcher.local, processes=2, **settings)
    return Group(launch=launch, folder=folder / "stage", origin=origin)


@pytest.fixture(autouse=True)
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launcher without torch; after a test nothing of it runs."""
    monkeypatch.setattr(Watch, "_command", lambda watch: [sys.executable, str(PROCESSES), str(watch.path)])
    monkeypatch.setattr(group, "SETTLING", 1.0)
    yield
    wait_for(lambda: not left(tmp_path))


def left(folder: Path) -> list[str]:
    """Processes of this test, those that have only begun among them."""
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if "processes.py" in line and str(folder) in line]


def test_the_command_shows_what_rank_0_tells_and_takes_its_figures(tmp_path: Path) -> None:
    given = context(tmp_path, metrics={"warnings": ["earlier"]})
    make_group(tmp_path)(SFT, given)
    assert isinstance(given.progress, Recorder)
    assert given.progress.started == (10, 0)
    assert list(given.progress.steps) == list(range(1, 11))
    assert given.progress.notes == ["2 processes, engine ddp", "trained"]
    assert given.progress.parts
    assert given.metrics == {"warnings": ["earlier"], "steps": 10, "rank": 0}
    assert not list((tmp_path / "stage").glob("*.json")) + list((tmp_path / "stage" / "launch").glob("*"))


HOLES = """
import sys
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
freed = [bytearray(b"x") * (4 << 20) for _ in range(2)]
del freed  # a first big block makes the heap hold later ones
blocks = [bytearray(b"x") * (3 << 20) for _ in range(20)]
full = resident()
del blocks[::2]
open(sys.argv[1], "w").write(str(full - resident()))
"""


def test_processes_give_back_memory_between_blocks_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, returned = context(tmp_path), tmp_path / "returned"
    monkeypatch.setattr(Watch, "_command", lambda watch: [sys.executable, "-c", HOLES, str(returned)])
    with pytest.raises(PosttrainError):
        make_group(tmp_path)(SFT, given)
    assert int(returned.read_text()) > 25_000  # of 30,000 kB


DEATH = r"rank 1 of 2 on .* (ended|was taken down by SIGKILL)"
ACTS = {
    "bad input": ({"ACT_0": "lose", "ACT_1": "reject"}, BadInput, "^sft.data: has a bad record\n    Mend it$"),
    "divergence": ({"ACT": "diverge"}, Diverged, "training diverged at step 3"),
    "full disk": (
        {"ACT_0": "lack", "ACT_1": "fill"},
        DiskFailed,
        r"^runs/step: No space left on device \([\d,]+ bytes free\)\n    Nothing published is lost",
    ),
    "bug": ({"ACT_0": "lose", "ACT_1": "bug"}, RankFailed, r"KeyError: 'prompt' \(in rank 1 of 2\)"),
    "death": (
        {"ACT_0": "lose", "ACT_1": "die"},
        PosttrainError,
        DEATH,
    ),
    "death, others stuck": (
        {"ACT_0": "hang", "ACT_1": "die"},
        PosttrainError,
        DEATH,
    ),
    "death, others stop": ({"ACT_0": "wait", "ACT_1": "die"}, PosttrainError, DEATH),
    "hang, noticed": ({"ACT_0": "lose", "ACT_1": "hang"}, PosttrainError, "rank 1 of 2 hung"),
    "one is asked to stop": ({"ACT": "wait"}, Interrupted, "stopped after step 3 of 10"),
}


@pytest.mark.parametrize("name", ACTS)
def test_the_first_fault_is_the_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acts, kind, message = ACTS[name]
    for variable, act in acts.items():
        monkeypatch.setenv(variable, act)
    if name == "death, others stop":
        monkeypatch.setattr(group, "TICK", 2.0)  # all is over before anybody looks
    given = context(tmp_path, stop_requested=lambda: name == "one is asked to stop" and len(seen(tmp_path)) == 2)
    with pytest.raises(kind, match=message) as caught:
        make_group(tmp_path)(SFT, given)
    assert type(caught.value) is kind
    if kind is RankFailed:
        assert 'raise KeyError("prompt")' in str(caught.value.__cause__)
    if kind in (BadInput, DiskFailed, Diverged):
        assert [note for note in recorder(given).notes if "ended with" in note]
    assert (tmp_path / "stage" / "job.json").exists()  # for whoever looks for the cause


def recorder(given: StageContext) -> Recorder:
    assert isinstance(given.progress, Recorder)
    return given.progress


def seen(folder: Path) -> list[Path]:
    return list((folder / "stage").glob("seen.*"))


def test_a_launcher_of_the_user_gets_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("POSTTRAIN_LAUNCHER", shlex.join([sys.executable, str(PROCESSES)]))
    given = context(tmp_path)
    launch = LaunchConfig(kind=Launcher.own, processes=2)
    own = Group(launch=launch, folder=tmp_path / "stage", origin=CORE_ORIGIN)
    own(SFT, given)
    assert given.metrics["steps"] == 10
    monkeypatch.setenv("ACT", "wait")  # it gets no signal
    with pytest.raises(Interrupted, match=r"stopped after step . of 10"):
        own(SFT, context(tmp_path, stop_requested=lambda: len(seen(tmp_path)) == 2))


def test_silence_ends_a_stage_of_a_plugin_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", "hang")
    with pytest.raises(PluginFailed, match=r"stage 'mine' of plugin mine \(mine 1.0\): rank . of 2 hung"):
        make_group(tmp_path, origin="mine (mine 1.0)", silence_seconds=2.0)(SFT, context(tmp_path))


def test_processes_that_did_enough_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", "hang")
    make_group(tmp_path)  # its folder
    given, path = context(tmp_path), tmp_path / "stage" / "job.json"
    (tmp_path / "stage" / "launch").mkdir()
    launch = LaunchConfig(kind=Launcher.local, processes=2)
    group.write_job(path, SFT, given, origin="posttrain", world=2, launch=launch)
    told: list[Any] = []
    watch = Watch(
        launch=launch, shape=shape_of(launch), path=path, show=lambda signs: told.extend(signs.events()),
        enough=lambda: len(seen(tmp_path)) == 2,
    )  # fmt: skip
    watch.run()
    assert any(event[:3] == [0, "start", 10] for event in told)
    assert not left(tmp_path)


def test_processes_that_do_not_stop_in_time_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", "hang")
    monkeypatch.setattr(group, "MARGIN", 0.5)
    given = context(tmp_path, stop_requested=lambda: len(seen(tmp_path)) == 2)
    with pytest.raises(Interrupted, match=r"no step was saved within launch\.shutdown_seconds=1"):
        make_group(tmp_path, shutdown_seconds=1.0)(SFT, given)


def test_whatever_ends_the_command_ends_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", "hang")

    def second_signal() -> bool:
        if len(seen(tmp_path)) == 2:
            raise Interrupted("stopped by SIGINT")
        return False

    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        make_group(tmp_path)(SFT, context(tmp_path, stop_requested=second_signal))


def test_the_end_of_the_launcher_ends_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", "hang")

    def kill() -> bool:
        if len(seen(tmp_path)) == 2:
            os.kill(parent_pid(int(seen(tmp_path)[0].read_text())), signal.SIGKILL)
        return False

    with pytest.raises(PosttrainError, match="the launcher of 2 processes was taken down by SIGKILL"):
        make_group(tmp_path)(SFT, context(tmp_path, stop_requested=kill))


def parent_pid(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_killed_command_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT", "hang")
    (tmp_path / "stage" / "launch").mkdir(parents=True)
    code = (
        "import json, os, sys; from pathlib import Path\n"
        "from posttrain.config.launch import LaunchConfig, Launcher; from posttrain.launch.group import Watch\n"
        "from posttrain.launch.shape import shape_of\n"
        f"Watch._command = lambda watch: [sys.executable, {str(PROCESSES)!r}, str(watch.path)]\n"
        "launch = LaunchConfig(kind=Launcher.local, processes=2)\n"
        f"path = Path({str(tmp_path)!r}, 'stage', 'job.json')\n"
        "path.write_text(json.dumps({'world': 2, 'command': os.getpid()}))\n"
        "Watch(launch=launch, shape=shape_of(launch), path=path, show=print).run()"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_for(lambda: len(seen(tmp_path)) == 2)
    command.kill()
    command.wait()
    wait_for(lambda: not left(tmp_path))
    assert not left(tmp_path)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_job_gives_back_what_the_command_had(tmp_path: Path) -> None:
    given = context(tmp_path)
    (tmp_path / "stage" / "launch").mkdir()
    path = tmp_path / "stage" / "job.json"
    group.write_job(path, SFT, given, origin="posttrain", world=2, launch=LaunchConfig())
    job = read_job(path)
    assert parent_of(job) == given.parent
    folder = path.parent / "launch"
    found = read_records(folder, job.records), read_records(folder, job.eval_records)
    assert [digest_records(each) for each in found] == [digest_records(RECORDS[:1]), digest_records(RECORDS[1:])]
    assert [list(each) for each in found] == [RECORDS[:1], RECORDS[1:]]
    (folder / "records.jsonl").write_text((folder / "records.jsonl").read_text().replace("x:1", "x:2"))
    assert len(read_records(folder, job.records)) == 1, "what the store has is trained without a look at the file"
    with pytest.raises(ArtifactDamaged, match=r"records\.jsonl is damaged: its SHA-256 is not the one in job\.json"):
        list(read_records(folder, job.records))
    made = config_of(job, SFT)
    assert type(made) is type(given.config)
    assert made == given.config
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "versions": {**values["versions"], "posttrain": "0.0.1", "torch": "1.0"}}))
    with pytest.raises(BadInput, match=r"has posttrain .*, torch .*, but the command posttrain 0\.0\.1, torch 1\.0"):
        read_job(path)


@pytest.mark.parametrize("words", [[consent.FLAG], []])
def test_processes_have_the_consent_of_the_command_line_and_no_other(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, trusted = plugins.load(), list[bool]()
    path = tmp_path / "run" / "stages" / "mine" / "job.json"
    (path.parent / "launch").mkdir(parents=True)
    with consent.given_by(["recipe=mine", *words]):
        write_job(
            path, host.stages["sft"], context(tmp_path), origin=host.origin("sft"), world=1, launch=LaunchConfig()
        )
    monkeypatch.setattr(processes, "join", lambda seconds: None)
    here = "posttrain.launch.plugin.run_here"
    monkeypatch.setattr(here, lambda *_, **__: trusted.append(consent.is_trusted("0" * 64)))
    worker._work(path, 0, Stop(path.parent / "launch" / "stop"))
    assert trusted == [bool(words)]


def test_records_that_json_would_change_are_rejected(tmp_path: Path) -> None:
    tuples = Conversation(messages=({"role": "user", "content": "a", "calls": ("b",)},), where="x:7")
    given = context(tmp_path)
    object.__setattr__(given, "records", [tuples])
    with pytest.raises(PluginFailed, match="the record x:7 of stage 'mine' has values that JSON lacks"):
        make_group(tmp_path)(SFT, given)
