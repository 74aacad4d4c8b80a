"""Records on disk are those that were read: one by one, in any order, in another process, and with any values."""

from __future__ import annotations

import datetime
import errno
import json
import multiprocessing
import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.schema import Source
from posttrain.data import stored
from posttrain.data.held import digest_records
from posttrain.data.mixing import read_rows, weigh
from posttrain.data.records import Conversation, Feedback, Origin, Preference, Question, Record, Text
from posttrain.data.stored import JoinedRecords, RecordFile, StoredRecords, origins_of, take

ASKED: Any = {"role": "user", "content": "half of a pair: \ud800", "when": datetime.date(2024, 2, 29), "sum": 0.1}
SAID: Any = {"role": "assistant", "content": "c" * 900, "tool_calls": [{"function": {"arguments": {"a": [None, 1]}}}]}
FIRST, SECOND = Origin(number=0, path="a", weight=2.0), Origin(number=3, path="b", share=0.25)
ONE: list[Record] = [
    Conversation(messages=(ASKED, SAID), where="a:1", tools=({"name": "t"},), origin=FIRST, unread=("id",), group="g"),
    Text(text="", where="a:2", origin=FIRST),
    Preference(prompt=(ASKED,), chosen=(SAID,), rejected=(SAID, SAID), where="a:3", origin=FIRST),
    Feedback(prompt=(ASKED,), completion=(SAID,), label=False, where="a:4", origin=SECOND),
    Question(prompt=(ASKED,), where="a:5", answers=(1, "one", {"a": 1}), meta={"format": {}}, origin=SECOND),
]
RECORDS = [replace(record, where=f"{record.where}.{number}") for number in range(40) for record in ONE]
RECORDS.sort(key=lambda record: record.origin.number)


@pytest.fixture(params=[1 << 23, 3000], ids=["in memory", "on disk"])
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredRecords:
    """RECORDS, once few enough for the memory, and once in a file that is read piece by piece."""
    monkeypatch.setattr(stored, "AT_ONCE", request.param)
    monkeypatch.setattr(stored, "AHEAD", 5000)
    return store(RECORDS, tmp_path / "made" / "here")


def store(records: list[Record], folder: Path | None = None) -> StoredRecords:
    file = RecordFile(folder)
    for record in records:
        if [record.origin] != file.origins[-1:]:
            file.begin(record.origin)
        file.append(record)
    return StoredRecords(file)


def test_records_are_those_that_were_added(kept: StoredRecords) -> None:
    assert [*kept] == RECORDS
    assert (len(kept), kept[-1], kept[7]) == (len(RECORDS), RECORDS[-1], RECORDS[7])
    assert digest_records(kept) == digest_records(RECORDS)
    assert [*origins_of(kept)] == [record.origin for record in RECORDS]
    with pytest.raises(IndexError):
        kept[len(RECORDS)]


def test_they_are_taken_in_any_order_and_again(kept: StoredRecords) -> None:
    places = [random.Random(0).randrange(len(RECORDS)) for _ in range(300)]
    wanted = [RECORDS[place] for place in places]
    found = take(kept, places)
    assert [*found] == wanted == [*take(RECORDS, places)]
    assert [*found[20:90:3]] == wanted[20:90:3]
    assert [*take(found[::-1], [0, 0])] == [wanted[-1]] * 2
    assert [*origins_of(found)] == [record.origin for record in wanted]


def test_another_origin_stands_in_for_one(kept: StoredRecords) -> None:
    other = replace(SECOND, share=0.5)
    changed = kept.take(range(100, 200)).with_origins({SECOND: other})
    wanted = [replace(each, origin=other) if each.origin == SECOND else each for each in RECORDS[100:200]]
    assert [*changed] == wanted
    assert {*changed.origins()} == {each.origin for each in wanted}


def test_records_of_several_sequences_are_one(kept: StoredRecords) -> None:
    joined = JoinedRecords(kept, (), RECORDS[:3])
    assert [*joined] == [joined[at] for at in range(len(joined))] == [*RECORDS, *RECORDS[:3]]
    assert (joined[-1], joined[len(RECORDS) - 1 :]) == (RECORDS[2], [RECORDS[-1], *RECORDS[:3]])
    assert [*origins_of(joined)] == [record.origin for record in joined]


def test_weights_repeat_the_same_records_on_disk_and_in_memory(kept: StoredRecords) -> None:
    half = kept.with_origins({SECOND: replace(SECOND, weight=1.5)})
    assert [*weigh(half, seed=3)] == [*weigh([*half], seed=3)]
    assert len(weigh(half, seed=3)) == 2 * 120 + 120


class Strange:
    """A value of a plugin's reader that cannot be written."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_a_record_that_cannot_be_written_stays_as_it_is() -> None:
    value = Strange()
    odd = Conversation(messages=({"role": "user", "content": "a", "key": value}, SAID), where="a:1", origin=FIRST)
    found = store([ONE[0], odd, ONE[1]])
    assert [*found] == [ONE[0], odd, ONE[1]]
    assert found[1].messages[0]["key"] is value


def _digest(records: StoredRecords, queue: Any) -> None:
    queue.put(digest_records(records))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_processes_read_one_file_at_once(kept: StoredRecords) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    parts = [kept[first : first + 40] for first in range(0, len(kept), 40)]
    processes = [context.Process(target=_digest, args=(part, queue)) for part in parts]
    for process in processes:
        process.start()
    found = {queue.get() for _ in processes}
    for process in processes:
        process.join()
    assert found == {digest_records(RECORDS[first : first + 40]) for first in range(0, len(RECORDS), 40)}


def test_a_read_file_leaves_nothing_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "AT_ONCE", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) + "\n" for n in range(50)))
    found = read_rows([Source(path=str(path))], "conversations", tmp_path / "cache")
    assert [record.where for record in found] == [f"{path}:{line}" for line in range(1, 51)]
    assert [*(tmp_path / "cache").iterdir()] == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            pass

    monkeypatch.setattr(stored, "AT_ONCE", 100)
    monkeypatch.setattr(stored, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=str(tmp_path)):
        store(RECORDS, tmp_path)
