"""The ledger: nothing acknowledged is lost, nothing written can be changed unseen, and the runs can make it again."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from posttrain.errors import ArtifactDamaged, BadInput, DiskFailed, Interrupted, PluginFailed, PosttrainError
from posttrain.ledger import Lift, check, lifts, record, store
from posttrain.ledger.audit import rebuild, verify
from posttrain.ledger.chain import faults, link
from posttrain.ledger.lift import KINDS
from posttrain.ledger.store import raw_rows
from tests.support import warm
from tests.support.command import main
from tests.support.fakes import Script, only_run, run_recipe, write_project
from tests.support.judgements import ROOT, add, judgement, task_verdict


def edit(*statements: str) -> None:
    with closing(sqlite3.connect(ROOT / "ledger.sqlite")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def content() -> list[dict[str, Any]]:
    with store.reading(ROOT) as connection:
        return raw_rows(connection)


def test_a_row_tells_who_when_what_and_how_it_ended() -> None:
    add("first", state="fail")
    row = lifts(ROOT)[0].lift
    assert (row.run, row.recipe, row.stage, row.lineage, row.base_model) == ("first", "mine", "sft", "sft", "base")
    assert (row.task, row.n, row.lift, row.low, row.high) == ("task0", 100, 0.5, 0.4, 0.6)
    assert (row.state, row.verdict) == ("fail", "fail")
    assert row.recorded_by
    assert row.recorded_at.endswith("+00:00")


def test_rows_are_added_and_never_replaced() -> None:
    for state in ("undecided", "pass", "pass", "undecided"):
        add(state=state)
    assert [row.lift.verdict for row in lifts(ROOT)] == ["undecided"] * 2 + ["pass"] * 2 + ["undecided"] * 2
    assert [row.seq for row in lifts(ROOT)] == list(range(1, 7))
    assert len(verify(ROOT)) == 6


def test_a_verdict_without_a_task_adds_nothing() -> None:
    add(tasks=0)
    add()
    add(tasks=0)
    assert len(lifts(ROOT)) == 2


def test_times_never_go_back_even_when_the_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime as clocks

    class Clock(clocks.datetime):
        @classmethod
        def now(cls, tz: clocks.tzinfo | None = None) -> Clock:
            return cls(2001, 1, 1, tzinfo=tz)

    add("first")
    monkeypatch.setattr("posttrain.ledger.datetime", Clock)
    add("second")
    times = [row.lift.recorded_at for row in lifts(ROOT)]
    assert times == sorted(times)
    assert len(set(times)) == 2


EDITS = {
    "changed figure": (["UPDATE lifts SET lift = 0.9 WHERE seq = 3"], "row 3 (run1, sft, task0) was changed"),
    "changed by one bit": (["UPDATE lifts SET low = 0.4000000000000001 WHERE seq = 3"], "row 3"),
    "changed verdict": (["UPDATE lifts SET verdict = 'pass' WHERE seq = 4"], "row 4 (run1, sft, task1) was changed"),
    "changed type": (["UPDATE lifts SET n = 'many' WHERE seq = 3"], "row 3"),
    "bytes": (["UPDATE lifts SET task = x'00ff' WHERE seq = 3"], "row 3"),
    "truth value": (["UPDATE lifts SET higher_is_better = 0 WHERE seq = 3"], "row 3"),
    "hash": (["UPDATE lifts SET hash = 'other' WHERE seq = 3"], "row 3"),
    "first row taken out": (["DELETE FROM lifts WHERE seq = 1"], "removed or inserted between row 0 and row 2"),
    "row taken out": (["DELETE FROM lifts WHERE seq = 3"], "between row 2 and row 4"),
    "last row taken out": (["DELETE FROM lifts WHERE seq = 8"], "ends with row 7, but 8 rows were written"),
    "taken out and closed up": (
        ["DELETE FROM lifts WHERE seq = 3", "UPDATE lifts SET seq = seq - 1 WHERE seq > 3"],
        "does not follow the row before it",
    ),
    "exchanged": (
        [
            "UPDATE lifts SET seq = 100 WHERE seq = 3",
            "UPDATE lifts SET seq = 3 WHERE seq = 5",
            "UPDATE lifts SET seq = 5 WHERE seq = 100",
        ],
        "does not follow the row before it",
    ),
    "put in": (
        [
            "CREATE TEMP TABLE copy AS SELECT * FROM lifts WHERE seq = 8",
            "UPDATE copy SET seq = 9, recorded_by = 'other', previous = hash",
            "INSERT INTO lifts SELECT * FROM copy",
        ],
        "row 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_whatever_is_done_to_a_past_row_is_found(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        add(f"run{number}", state="fail")
    statements, expected = EDITS[case]
    edit(*statements)
    assert main("ledger", "verify") == 5
    message = capsys.readouterr().err
    assert message.startswith("error: runs/ledger.sqlite was changed after it was written:")
    assert expected in message


LIFTS = st.builds(
    Lift,
    **{name: st.floats(-1e9, 1e9) for name, kind in KINDS.items() if kind is float},
    **{name: st.text(max_size=9) for name, kind in KINDS.items() if kind is str},
    n=st.integers(0, 10**6),
    higher_is_better=st.booleans(),
)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=9))


@given(st.lists(LIFTS, min_size=1, max_size=6), st.data())
def test_no_value_of_no_row_can_be_another(found: list[Lift], data: st.DataObject) -> None:
    rows = list(link(found, None))
    records = [{"seq": row.seq, **asdict(row.lift), "previous": row.previous, "hash": row.hash} for row in rows]
    assert faults(records, len(rows)) == []
    record = data.draw(st.sampled_from(records))
    field = data.draw(st.sampled_from([*KINDS, "seq", "previous", "hash"]))
    value = data.draw(VALUES.filter(lambda other: repr(other) != repr(record[field])))
    assume(field != "seq" or type(value) is int)  # the key of an SQLite table is an integer, true is stored as 1
    record[field] = value
    assert faults(records, len(rows))


def forge() -> None:
    """Change a row and give every row after it a hash that fits."""
    rows = lifts(ROOT)
    changed = [replace(row.lift, lift=0.9) if row.seq == 3 else row.lift for row in rows]
    with store.writing(ROOT) as connection:
        store.clear(connection)
        store.append(connection, link(changed, None))


def test_a_forged_chain_does_not_agree_with_its_runs() -> None:
    for number in range(3):
        add(f"run{number}")
    forge()
    with pytest.raises(ArtifactDamaged, match="row 3 differs from the copy in its run"):
        verify(ROOT)


def test_a_row_that_only_its_run_holds_is_missed() -> None:
    add("first")
    path = ROOT / "first/stages/sft/lifts.jsonl"
    path.write_text(path.read_text().replace("task1", "task2"))
    with pytest.raises(ArtifactDamaged, match="a run holds a row that the ledger lacks") as caught:
        verify(ROOT)
    assert "row 2 is not in its run" in str(caught.value)


@pytest.mark.parametrize("loss", ["deleted", "garbage", "torn", "edited", "emptied"])
def test_a_rebuilt_ledger_holds_the_same_rows(loss: str) -> None:
    for number in range(30):
        add(f"run{number % 7}", stage=("sft", "dpo")[number % 2], lift=number / 100)
    path = ROOT / "ledger.sqlite"
    before = content()
    if loss == "deleted":
        path.unlink()
    elif loss == "garbage":
        path.write_bytes(b"no database" * 1000)
    elif loss == "torn":
        path.write_bytes(path.read_bytes()[:5000])
    elif loss == "edited":
        edit("UPDATE lifts SET lift = 9 WHERE seq > 10")
    else:
        edit("DELETE FROM lifts")
    rebuild(ROOT)
    assert content() == before
    assert len(verify(ROOT)) == 60
    assert path.with_name("ledger.sqlite.damaged-1").exists() is (loss in ("garbage", "torn"))


def test_a_rebuild_from_the_runs_of_the_pipeline_gives_the_same_rows(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(working_folder)
    run_recipe(Script())
    run_recipe(Script(), "sft.gate.tasks.some.min_lift=0.1")  # judged again, with the same result
    run_recipe(Script(), "seed=1")
    capsys.readouterr()
    assert main("ledger", "export") == 0
    before = capsys.readouterr().out
    assert len(before.splitlines()) == 4
    (ROOT / "ledger.sqlite").unlink()
    assert main("ledger", "rebuild") == 0
    assert "4 rows" in capsys.readouterr().out
    assert main("ledger", "export") == 0
    assert capsys.readouterr().out == before


def test_a_rebuild_that_would_lose_rows_is_rejected() -> None:
    add("first")
    add("second")
    before = content()
    (ROOT / "first/stages/sft/lifts.jsonl").unlink()
    with pytest.raises(BadInput, match="2 rows are in the ledger alone, of first"):
        rebuild(ROOT)
    assert content() == before


def test_a_rebuild_does_not_believe_a_run_that_contradicts_its_manifest(working_folder: Path) -> None:
    write_project(working_folder)
    run_recipe(Script())
    path = only_run() / "stages/dpo/lifts.jsonl"
    path.write_text(path.read_text().replace("sft>dpo", "sft>dpo>dpo"))
    with pytest.raises(ArtifactDamaged, match="contradicts the manifest"):
        rebuild(ROOT)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"task": 1}'])
def test_a_torn_copy_is_named_by_file_and_line(line: str) -> None:
    add("first")
    path = ROOT / "first/stages/sft/lifts.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ArtifactDamaged, match=r"lifts\.jsonl:3 is (not a lift|damaged)"):
        rebuild(ROOT)


class Killed(BaseException):
    """The process died here."""


def test_a_writer_that_died_before_the_row_was_final_writes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    add("first")

    def die(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.ledger.append", die)
        with pytest.raises(Killed):
            add("second")
    assert len(lifts(ROOT)) == 2
    add("third")
    add("second")
    assert [row.lift.run for row in lifts(ROOT)] == ["first"] * 2 + ["third"] * 2 + ["second"] * 2
    assert len(verify(ROOT)) == 6
    before = content()
    (ROOT / "ledger.sqlite").unlink()
    rebuild(ROOT)
    assert content() == before


WRITERS, APPENDS, KILLED = 16, 12, (3, 11)
WRITER = """
import sys
from tests.support.judgements import add
for number in range(int(sys.argv[2])):
    add(f"run{sys.argv[1]}", lift=number / 1000)
    print(number, flush=True)
"""


def start_writer(number: int) -> subprocess.Popen[str]:
    """A process that records verdicts and prints the number of each once it is recorded."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    count = 1_000_000 if number in KILLED else APPENDS
    with Path(f"told{number}").open("w") as told:
        command = [sys.executable, "-c", WRITER, str(number), str(count)]
        return warm.Warm(command, stdout=told, text=True, env=environment)


def acknowledged(number: int) -> int:
    """How many verdicts a writer was told to be recorded."""
    return Path(f"told{number}").read_text().count("\n")


def test_sixteen_writers_two_of_them_killed_lose_nothing_and_break_no_chain() -> None:
    writers = [start_writer(number) for number in range(WRITERS)]
    for number in KILLED:
        while acknowledged(number) < 3 and writers[number].poll() is None:
            time.sleep(0.01)
        writers[number].send_signal(signal.SIGKILL)
    codes = [process.wait(timeout=600) for process in writers]
    assert codes == [-signal.SIGKILL if number in KILLED else 0 for number in range(WRITERS)]
    kept: dict[str, list[int]] = {}
    for row in lifts(ROOT):
        if row.lift.task == "task0":
            kept.setdefault(row.lift.run, []).append(round(row.lift.lift * 1000))
    for number in range(WRITERS):
        written = kept.get(f"run{number}", [])
        assert written == list(range(len(written)))  # none lost, none twice, in order
        assert acknowledged(number) <= len(written) <= acknowledged(number) + (number in KILLED)
        assert len(written) == APPENDS or number in KILLED
    for number in KILLED:  # their recipes, run again, may have a verdict to write that their runs already hold
        add(f"run{number}", lift=len(kept[f"run{number}"]) / 1000)
    before = verify(ROOT)
    (ROOT / "ledger.sqlite").unlink()
    rebuild(ROOT)
    assert content() == before


def fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SQLite find no room beyond what the ledger has."""
    connect = sqlite3.connect

    def cramped(*arguments: Any, **settings: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **settings)
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size as the least
        return connection

    monkeypatch.setattr("posttrain.ledger.store.sqlite3.connect", cramped)


def test_a_full_disk_is_named_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    add("first")
    before = content()
    with monkeypatch.context() as patch:
        fill(patch)
        with pytest.raises(DiskFailed, match=r"runs/ledger\.sqlite: could not be written: database or disk is full"):
            add("second", tasks=200)
    assert content() == before
    add("second", lift=0.5)
    verify(ROOT)


def test_a_ledger_that_stays_locked_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    add("first")
    monkeypatch.setattr(store, "WAIT_SECONDS", 0.05)
    with closing(sqlite3.connect(ROOT / "ledger.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for call in (lambda: add("second"), lambda: lifts(ROOT), lambda: check(ROOT)):
            with pytest.raises(Interrupted, match="has kept it locked"):
                call()
    add("second")


BROKEN: dict[str, tuple[bytes, type[PosttrainError], str]] = {
    "garbage": (b"no database" * 100, ArtifactDamaged, "posttrain ledger rebuild"),
    "torn": (b"SQLite format 3\0" + b"\0" * 50, ArtifactDamaged, "posttrain ledger rebuild"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_ledger_is_named_before_anything_is_trained(case: str, working_folder: Path) -> None:
    write_project(working_folder)
    data, error, words = BROKEN[case]
    ROOT.mkdir()
    (ROOT / "ledger.sqlite").write_bytes(data)
    script = Script()
    with pytest.raises(error, match=words):
        run_recipe(script)
    assert script.trained == []


def test_a_page_damaged_in_the_middle_is_named() -> None:
    for number in range(60):
        add("run", lift=number / 1000)
    path = ROOT / "ledger.sqlite"
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * len(data[4096:])
    path.write_bytes(data)
    with pytest.raises(ArtifactDamaged, match="ledger rebuild"):
        lifts(ROOT)


@pytest.mark.parametrize("version", [0, 7])
def test_a_ledger_of_another_format_is_rejected(version: int) -> None:
    ROOT.mkdir()
    edit("CREATE TABLE lifts (artifact TEXT)", f"PRAGMA user_version = {version}")
    for call in (add, lambda: lifts(ROOT), lambda: rebuild(ROOT), lambda: verify(ROOT), lambda: check(ROOT)):
        with pytest.raises(BadInput, match=f"its format is {version}, not {store.FORMAT}"):
            call()


def put_foreign(path: Path, kind: str) -> None:
    """Put something else in the place of a ledger that has recorded a run."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    else:
        edit("CREATE TABLE lifts (artifact TEXT)", f"PRAGMA user_version = {store.FORMAT}")


@pytest.mark.parametrize("kind", ["folder", "pipe", "empty", "other table"])
@pytest.mark.parametrize("words", [("leaderboard",), ("ledger", "export"), ("ledger", "verify")])
def test_what_is_no_ledger_is_damaged(kind: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    add("first")
    put_foreign(ROOT / "ledger.sqlite", kind)
    assert main(*words) == 5
    assert "runs/ledger.sqlite" in capsys.readouterr().err


NUMBERS = st.one_of(
    st.sampled_from([-0.0, 0.0, 5e-324, -5e-324, 1e308, -1.7976931348623157e308, 1e-300, 2.0**53, -1.0, 0.1, 1e22]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**70), 2**70),
)
TEXTS = st.one_of(
    st.sampled_from(["", "\ud800", "a\udfffb", "\u2028", "\u2029", "\x85", "\r\n", "\0", "'", "%s"]),
    st.text(st.characters(), max_size=9),  # half surrogate pairs among them
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.fixed_dictionaries(
        dict.fromkeys(("base", "parent", "candidate", "lift", "low", "high", "threshold"), NUMBERS)
    ),
    n=st.integers(-(2**63) + 1, 2**63 - 1),
    up=st.booleans(),
    texts=st.fixed_dictionaries(dict.fromkeys(("task", "metric", "filter", "questions", "role", "against"), TEXTS)),
    name=TEXTS,
)
def test_whatever_a_row_holds_an_untouched_ledger_verifies(
    numbers: dict[str, float], n: int, up: bool, texts: dict[str, str], name: str, tmp_path: Path
) -> None:
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    task = replace(task_verdict("pass"), n=n, higher_is_better=up, **numbers, **texts)  # type: ignore[arg-type]
    given = judgement()
    verdict = replace(given.verdict, tasks=(task,), scored_by=(name,), judged_by=(name, name))
    given = replace(given, recipe=name, base=replace(given.base, name=name), verdict=verdict)
    folder = root / given.run / "stages" / given.stage
    folder.mkdir(parents=True)
    record(root, folder, given)
    record(root, folder, given)
    assert len(verify(root)) == 1
    assert rebuild(root) == (1, 0)
    assert len(verify(root)) == 1


@pytest.mark.parametrize("figures", [{"n": 2**63}, {"n": -(2**63)}, {"n": None}, {"lift": 10**400}, {"metric": b"x"}])
def test_a_value_that_no_ledger_holds_is_the_plugins_fault(figures: dict[str, Any]) -> None:
    with pytest.raises(PluginFailed, match="the verdict about sft cannot be recorded"):
        add(**figures)
    assert lifts(ROOT) == []


def test_a_changed_row_is_no_entry_of_the_leaderboard(capsys: pytest.CaptureFixture[str]) -> None:
    add("first", state="fail")
    edit("UPDATE lifts SET verdict = 'pass', candidate_score = 1.0")
    assert main("leaderboard") == 5
    captured = capsys.readouterr()
    assert "ledger.sqlite was changed after it was written" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("figures", [{"lift": float("nan")}, {"n": 1.5}, {"metric": None}, {"low": "much"}])
def test_a_verdict_that_holds_no_figures_is_the_plugins_fault(figures: dict[str, Any]) -> None:
    with pytest.raises(PluginFailed, match="the verdict about sft cannot be recorded"):
        add(**figures)
    assert lifts(ROOT) == []


def test_export(capsys: pytest.CaptureFixture[str]) -> None:
    add("first")
    assert main("ledger", "export") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == content()
    assert main("ledger", "export", "--format=csv") == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == table


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ledger"], "needs one of export, rebuild, verify"),
        (["ledger", "verfy"], "Did you mean verify?"),
        (["ledger", "export", "--format", "cvs"], "Did you mean csv?"),
        (["ledger", "verify", "--format", "csv"], "--format"),
        (["ledger", "verify", "runs"], "output_root=DIR"),
        (["ledger", "verify", "root=runs"], "Available: output_root"),
        (["ledger", "verify"], "there is no ledger"),
        (["ledger", "export"], "there is no ledger"),
        (["ledger", "rebuild"], "holds no judged run"),
    ],
)
def test_bad_words(words: list[str], expected: str, capsys: pytest.CaptureFixture[str], working_folder: Path) -> None:
    assert main(*words) == 2
    assert expected in capsys.readouterr().err
    assert not list(working_folder.iterdir())
