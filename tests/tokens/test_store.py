"""The store of rendered rows: filled once, exact, and never half read."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import contents
from posttrain.data.held import digest_records
from posttrain.data.records import Conversation, Document, Origin, Text
from posttrain.digests import file_digest
from posttrain.engine.config import TrainOn
from posttrain.errors import BadInput, Interrupted
from posttrain.sft.examples import Rendering
from posttrain.tokens import filling, store
from posttrain.tokens.chat import Rendered
from posttrain.tokens.filling import ARRAYS, Fill
from posttrain.tokens.store import store_key, stored_table
from posttrain.tokens.table import TableRow, TokenTable
from tests.support.tiny import TEMPLATE, tiny_tokenizer

KEY = "k"
OTHER = Origin(number=1, path="texts.jsonl", share=0.5)


def talk(number: int) -> Conversation:
    said = "I cannot help with that." if number % 3 == 0 else f"It is {number}."
    messages = ({"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": said})
    return Conversation(messages=messages * (1 + number % 2), where=f"train.jsonl:{number}")


RECORDS: list[Document] = [
    *(Text(text=f"Plain {n}", where=f"é.txt:{n}", origin=OTHER) for n in range(2)),
    *map(talk, range(9)),
]


RENDERING = Rendering(tiny_tokenizer(), TrainOn.each)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "PIECE", 3)


@dataclass
class Work:
    """A fill that counts what it renders and can die or be stopped after so many records."""

    dies_after: int | None = None
    stops_after: int | None = None
    records: list[Document] = field(default_factory=lambda: list(RECORDS))
    done: int = 0
    notes: list[str] = field(default_factory=list)
    workers: int = 1
    rendering: Rendering = field(default_factory=lambda: RENDERING)

    def rows(self, records: Sequence[Any]) -> Iterator[TableRow]:
        return self.rendering.rows(map(self.read, records))

    def read(self, record: Any) -> Any:
        if self.done == self.dies_after:
            raise KeyboardInterrupt
        self.done += 1
        return record

    def table(self, folder: Path, key: str = KEY) -> TokenTable:
        stop = lambda: self.stops_after is not None and self.done >= self.stops_after  # noqa: E731
        fill = Fill(
            records=self.records, rows=self.rows, note=self.notes.append, stop_requested=stop, workers=self.workers
        )  # fmt: skip
        return stored_table(folder, key, fill)


def content(table: TokenTable) -> tuple[Any, ...]:
    arrays = [array.tobytes() for array in (table.ids, table.mask, table.rows, table.places)]
    return (*arrays, table.origins, table.texts)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / KEY).iterdir()}


EXPECTED = RENDERING.table(RECORDS)


def test_a_store_holds_what_rendering_in_memory_gives_and_renders_it_once(tmp_path: Path) -> None:
    first, second = Work(), Work()
    table = first.table(tmp_path)
    assert content(table) == content(EXPECTED)
    assert content(second.table(tmp_path)) == content(EXPECTED)
    assert (first.done, second.done) == (len(RECORDS), 0)
    assert {path.name for path in tmp_path.iterdir()} <= {KEY, "digests.json"}
    assert not table.ids.flags.writeable, "mapped, not held"
    documents = table.all()
    assert [documents.where(place) for place in range(3)] == ["é.txt:0", "é.txt:1", "train.jsonl:0"]
    assert [table.origins[number].path for number in documents.column("origin")[:3]] == ["texts.jsonl"] * 2 + ["data"]
    assert documents.column("flag").sum() == 3 + 1, "declining answers: 0, 3 twice, 6"
    assert documents.records.digests[2:5] == [documents.digests[2], *[documents.digests[4]] * 2]


def test_the_age_of_a_store_is_the_time_since_its_last_use(tmp_path: Path) -> None:
    Work().table(tmp_path)
    os.utime(tmp_path / KEY, (1, 1))
    Work().table(tmp_path)
    assert (tmp_path / KEY).stat().st_mtime > 1


def test_five_bytes_a_token_and_a_fixed_number_a_document(tmp_path: Path) -> None:
    table = Work().table(tmp_path)
    size = sum((tmp_path / KEY / f"{name}.bin").stat().st_size for name in ARRAYS)
    assert size == 5 * len(table.ids) + 50 * len(table) + len(table.places)


@pytest.mark.parametrize("after", range(len(RECORDS) + 1))
def test_a_killed_fill_goes_on_and_gives_the_same_bytes(tmp_path: Path, after: int) -> None:
    Work().table(tmp_path / "whole")
    first, second = Work(dies_after=after), Work()
    if after < len(RECORDS):
        with pytest.raises(KeyboardInterrupt):
            first.table(tmp_path)
        assert not (tmp_path / KEY).exists(), "half a store is none"
    else:
        first.table(tmp_path)
    second.table(tmp_path)
    assert files(tmp_path) == files(tmp_path / "whole")
    assert second.done == len(RECORDS) - (after // 3 * 3 if after < len(RECORDS) else after)


def test_a_fill_killed_while_it_joins_its_pieces_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(filling, "write_synced", die)
        with pytest.raises(KeyboardInterrupt):
            Work().table(tmp_path)
    again = Work()
    assert content(again.table(tmp_path)) == content(EXPECTED)
    assert again.done == 0


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_torn_piece_of_a_killed_fill_is_rendered_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Work(dies_after=9).table(tmp_path)
    pieces = sorted((tmp_path / f"{KEY}.filling").iterdir())
    assert [path.name for path in pieces] == ["0.piece", "1.piece", "2.piece"]
    tear(pieces[0])
    flip(pieces[1])
    again = Work()
    assert content(again.table(tmp_path)) == content(EXPECTED)
    assert again.done == len(RECORDS) - 3


@pytest.mark.parametrize("name", [*(f"{name}.bin" for name in ARRAYS), "manifest.json"])
@pytest.mark.parametrize("harm", [tear, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_store_is_named_and_made_again(tmp_path: Path, name: str, harm: Callable[[Path], Any]) -> None:
    Work().table(tmp_path)
    sound = files(tmp_path)
    harm(tmp_path / KEY / name)
    again = Work()
    table = again.table(tmp_path)
    assert again.done == len(RECORDS)
    [named] = again.notes
    assert "damaged token store, made again" in named
    assert str(tmp_path / KEY) in named
    assert files(tmp_path) == sound
    assert content(table) == content(EXPECTED)


@pytest.mark.parametrize("name", [f"{name}.bin" for name in ARRAYS])
@pytest.mark.parametrize("harm", [tear, flip, Path.unlink])
def test_a_known_store_is_not_hashed_again_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[[Path], Any]
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 3_600 * 10**9)  # the files are old
    hashed: list[str] = []
    monkeypatch.setattr(contents, "file_digest", lambda path: (hashed.append(path.name), file_digest(path))[1])
    Work().table(tmp_path)
    assert sorted(hashed) == sorted(f"{each}.bin" for each in ARRAYS)
    assert content(Work().table(tmp_path)) == content(EXPECTED)
    assert len(hashed) == len(ARRAYS)
    harm(tmp_path / KEY / name)
    again = Work()
    assert content(again.table(tmp_path)) == content(EXPECTED)
    assert again.done == len(RECORDS)
    assert "damaged token store, made again" in again.notes[0]


def test_a_store_under_the_name_of_another_is_not_read(tmp_path: Path) -> None:
    Work(records=list(RECORDS[:4])).table(tmp_path, "other")
    (tmp_path / "other").rename(tmp_path / KEY)
    again = Work()
    assert content(again.table(tmp_path)) == content(EXPECTED)
    assert "holds the rows of another key" in again.notes[0]


def test_a_bad_record_ends_the_fill_and_names_itself(tmp_path: Path) -> None:
    bad = replace(talk(5), messages=({"role": "user", "content": "<|end|>"}, talk(5).messages[1]))
    with pytest.raises(BadInput, match=r"train\.jsonl:5: turn 1 \(user\) holds the special token"):
        Work(records=[*RECORDS, bad]).table(tmp_path)
    assert not (tmp_path / KEY).exists()


def test_a_stop_keeps_what_is_rendered(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"^stopped while records were rendered$"):
        Work(stops_after=4).table(tmp_path)
    again = Work()
    assert content(again.table(tmp_path)) == content(EXPECTED)
    assert again.done == len(RECORDS) - 6


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    for workers in (1, 2, 4):
        work = Work(workers=workers)
        work.table(tmp_path / str(workers))
        assert files(tmp_path / str(workers)) == files(tmp_path / "1")
        assert work.done == (len(RECORDS) if workers == 1 else 0), "others render"


def test_of_several_processes_the_first_bad_record_is_named(tmp_path: Path) -> None:
    forged = ({"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "x"})
    bad = {place: replace(talk(place), messages=forged, where=f"bad.jsonl:{place}") for place in (7, 8, 10)}
    records = [bad.get(place, record) for place, record in enumerate(RECORDS)]
    with pytest.raises(BadInput, match=r"bad\.jsonl:7: turn 1"):
        Work(records=records, workers=4).table(tmp_path)


def test_a_killed_process_is_told_and_the_next_fill_goes_on(tmp_path: Path) -> None:
    class Killed(Work):
        def read(self, record: Any) -> Any:
            if record is RECORDS[7]:
                while not (tmp_path / f"{KEY}.filling" / "0.piece").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(record)

    with pytest.raises(Interrupted, match="was killed, as the system does when memory runs out; set data_workers"):
        Killed(workers=2).table(tmp_path)
    again = Work()
    assert content(again.table(tmp_path)) == content(EXPECTED)
    assert again.done <= len(RECORDS) - 3


def test_a_stop_ends_several_processes(tmp_path: Path) -> None:
    class Slow(Work):
        def read(self, record: Any) -> Any:
            while record is RECORDS[7] and not (tmp_path / "stopped").exists():
                time.sleep(0.01)
            return super().read(record)

    def stop() -> bool:
        (tmp_path / "stopped").touch()
        return True

    slow = Slow(workers=2)
    fill = Fill(records=RECORDS, rows=slow.rows, stop_requested=stop, workers=2)
    with pytest.raises(Interrupted, match=r"^stopped while records were rendered$"):
        stored_table(tmp_path, KEY, fill)
    assert content(Work().table(tmp_path)) == content(EXPECTED)


def test_a_second_process_waits_for_the_first_and_maps_its_work(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    holder = (tmp_path / f"{KEY}.lock").open("ab")
    fcntl.flock(holder, fcntl.LOCK_EX)
    waiting, found = Work(), []
    thread = threading.Thread(target=lambda: found.append(waiting.table(tmp_path)))
    thread.start()
    while not waiting.notes:
        thread.join(0.01)
    assert waiting.notes == ["waits for another process that renders the same records"]
    Work().table(tmp_path / "elsewhere")
    shutil.move(tmp_path / "elsewhere" / KEY, tmp_path / KEY)  # the holder is done
    (tmp_path / f"{KEY}.lock").unlink()
    holder.close()
    thread.join()
    assert content(found[0]) == content(EXPECTED)
    assert waiting.done == 0


def test_the_key_covers_all_that_rows_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(records: list[Document] = RECORDS, template: str = TEMPLATE, eos: str = "", **settings: Any) -> str:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        if eos:
            tokenizer.eos_token = eos
        return store_key(digest_records(records), tokenizer, **settings)

    moved = [replace(RECORDS[0], where="other.txt:0"), *RECORDS[1:]]
    keys = [
        key(), key(RECORDS[1:]), key([*RECORDS[1:], RECORDS[0]]), key(moved), key(template=TEMPLATE + " "),
        key(eos="<|user|>"), key(train_on="each"), key(train_on="last"), key(variables={"date": "2026-01-31"}),
    ]  # fmt: skip
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    keys.append(key())
    monkeypatch.setattr(store, "_code_digest", lambda: "other")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(train_on="last") == key(train_on="last")


def test_the_code_of_the_key_is_that_of_the_files() -> None:
    assert store._code_digest() == store._code_digest.__wrapped__()
    root = Path(store.posttrain.__file__).parent
    assert all((root / name).exists() for name in store.CODE)


@given(st.lists(st.lists(st.integers(0, 3), max_size=80), max_size=12))
def test_documents_are_sorted_as_lists_are(ids: list[list[int]]) -> None:
    documents = TokenTable.of([Rendered(each, [True] * len(each), "") for each in ids]).all()
    assert [documents[place].ids for place in documents.in_order()] == sorted(ids)


def test_long_documents_with_one_beginning_are_sorted() -> None:
    ids = [[7] * 100_000 + [last] for last in (3, 1, 2)]
    documents = TokenTable.of([Rendered(each, [True] * len(each), "") for each in ids]).all()
    assert list(documents.in_order()) == [1, 2, 0]


def test_places_of_any_characters_are_kept() -> None:
    names = ["a.jsonl:1", "", "日本語\udce9:3"]
    documents = TokenTable.of([Rendered([1], [True], "", name) for name in names]).all()
    assert [documents.where(place) for place in range(3)] == names
    assert np.array_equal(documents.lengths, [1, 1, 1])
    assert json.dumps(documents[0].ids) == "[1]"
