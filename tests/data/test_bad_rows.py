"""Rows that cannot be read: counted, the first ten of each kind named at once, left out when a source says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import parquet

from posttrain.config.preparation import Action, PrepareConfig
from posttrain.config.schema import Format, Source
from posttrain.data.mixing import describe_bad, read_sources
from posttrain.data.reading import read_records
from posttrain.data.records import Conversation
from posttrain.data.rows import BadRow
from posttrain.data.stored import StoredRecords
from posttrain.errors import BadInput
from posttrain.prepare.preparation import Preparation

GOOD = json.dumps({"prompt": "Hi", "completion": "Hello"})
BAD = {
    "JSON": '{"prompt": "Hi", "compl',
    "encoding": '{"prompt": "\xe9"}',
    "shape": '{"prompt": "Hi"}',
    "columns": '{"prompt": "Hi", "completion": null}',
}


def write(path: Path, *lines: str) -> Source:
    path.write_bytes("\n".join(lines).encode("latin-1"))
    return Source(path=str(path))


def mix(*sources: Source) -> StoredRecords:
    return read_sources(sources, "conversations", 1)


def rejection(*sources: Source) -> list[str]:
    with pytest.raises(BadInput) as caught:
        mix(*sources)
    return [str(problem) for problem in caught.value.problems]


def test_every_kind_of_bad_row_is_told_from_the_good_ones(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD, *BAD.values(), "[1]", GOOD)
    source.columns = {"completion": "completion"}
    found = list(read_records(source, "conversations"))
    assert [type(each) for each in found] == [Conversation, *[BadRow] * 5, Conversation]
    bad = [(each.where.rpartition(":")[2], each.kind) for each in found if isinstance(each, BadRow)]
    assert bad == [("2", "JSON"), ("3", "encoding"), ("4", "columns"), ("5", "shape"), ("6", "shape")]


def test_all_of_a_few_are_named_at_once_with_the_share_that_would_leave_them_out(tmp_path: Path) -> None:
    *named, summary = rejection(write(tmp_path / "a.jsonl", GOOD, BAD["JSON"], GOOD, BAD["shape"]))
    assert [problem.split(": ")[0].rpartition(":")[2] for problem in named] == ["2", "4"]
    assert "a.jsonl: 2 of 4 rows cannot be read (1 by JSON, 1 by shape); max_bad_share is 0" in summary
    assert "max_bad_share: 0.5" in summary


def test_a_stage_may_leave_out_a_share_of_all_rows_together(tmp_path: Path) -> None:
    few = write(tmp_path / "a.jsonl", GOOD, BAD["JSON"], BAD["shape"])
    many = write(tmp_path / "b.jsonl", *[GOOD] * 17)
    assert len(read_sources([few, many], "conversations", 1, max_bad_share=0.1)) == 18
    with pytest.raises(BadInput, match=r"a\.jsonl: 2 of 3 rows cannot be read"):
        read_sources([few, many], "conversations", 1, max_bad_share=0.099)
    with pytest.raises(BadInput, match="is not valid JSON"):  # a source without a good row is none
        read_sources([write(tmp_path / "c.jsonl", BAD["JSON"]), many], "conversations", 1, max_bad_share=0.5)


def test_the_first_ten_of_each_kind_are_named_of_every_source(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", *[GOOD] * 20, *[BAD["JSON"]] * 30, *[BAD["encoding"]] * 3)
    two = write(tmp_path / "b.jsonl", GOOD, *[BAD["shape"]] * 11)
    problems = rejection(one, two)
    assert sum("not valid JSON" in problem for problem in problems) == 10
    assert sum("not UTF-8" in problem for problem in problems) == 3
    assert sum("b.jsonl:" in problem and "unknown shape" in problem for problem in problems) == 10
    assert sum("rows cannot be read" in problem for problem in problems) == 2


def test_rows_below_the_share_are_left_out_and_handed_on(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[GOOD] * 6, BAD["JSON"], BAD["encoding"])
    source.max_bad_share = 0.25
    records = mix(source)
    assert len(records) == 6
    (left_out,) = records.bad
    assert [row.kind for row in left_out.rows] == ["JSON", "encoding"]
    assert (left_out.read, dict(left_out.kinds)) == (8, {"JSON": 1, "encoding": 1})
    (line,) = describe_bad(records)
    counts = "2 of 8 rows cannot be read (1 by JSON, 1 by encoding)"
    assert line == f"{source.path}: {counts} and are left out, first {source.path}:7"
    source.max_bad_share = 0.24
    assert "max_bad_share is 0.24" in rejection(source)[-1]


def test_rows_left_out_are_in_the_ledger_of_the_preparation(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", GOOD)
    two = write(tmp_path / "b.jsonl", *[GOOD] * 2, BAD["JSON"], BAD["shape"])
    two.max_bad_share = 0.5
    config = PrepareConfig(exact=Action.ignore)
    ledger = Preparation(trained=mix(one, two), evaluated=mix(two), config=config, judges={}).run()
    ledger.write(tmp_path / "ledger.parquet", {})
    rows = parquet.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(range(9))
    unread = [row for row in rows if row["action"] == "drop"]
    places = [(row["set"], row["source"], row["where"][-1]) for row in unread]
    assert places == [("data", 1, "3"), ("data", 1, "4"), ("eval_data", 0, "3"), ("eval_data", 0, "4")]
    assert [row["evidence"].split(":")[0] for row in unread] == ["JSON", "shape"] * 2
    summary = ledger.summary({})
    assert (summary.read, summary.kept, summary.dropped, summary.found) == (5, 3, {"unreadable": 2}, {"unreadable": 2})
    assert [(source.read, source.kept) for source in summary.sources] == [(1, 1), (4, 2)]


def test_the_named_share_is_enough(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[GOOD] * 996, *[BAD["JSON"]] * 7)
    source.max_bad_share = float(rejection(source)[-1].partition("max_bad_share: ")[2].rstrip("}"))
    assert len(mix(source)) == 996


def test_no_share_makes_a_source_of_bad_rows_alone_sound(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[BAD["JSON"]] * 3)
    source.max_bad_share = 0.99
    assert len(rejection(source)) == 3


def test_a_file_that_ends_the_reading_stops_whatever_the_share(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    write(tmp_path / "x" / "a.jsonl", *[GOOD] * 9, BAD["JSON"])
    (tmp_path / "x" / "b.parquet").write_bytes(b"PAR1 but not really")
    problems = rejection(Source(path=str(tmp_path / "x"), max_bad_share=0.5))
    assert "a.jsonl:10: is not valid JSON" in problems[0]
    assert "b.parquet: is not a sound Parquet file" in problems[1]


@pytest.mark.parametrize(
    ("name", "data", "kinds"),
    [
        ("binary.jsonl", bytes(range(256)) * 40, {"JSON", "encoding"}),
        ("mixed.jsonl", b'{"prompt": "a", "completion": "b"}\n{"text": "c"}\n3\n', {"shape"}),
        ("cells.csv", b"prompt,completion\na,b\nc\n\xe9,d\n", {"cells", "encoding"}),
        ("array.json", b'[{"prompt": "a", "completion": "b"}, 3, {"text": 1}]', {"shape"}),
        ("keys.jsonl", b'{"prompt": "a", "prompt": "b"}\n', {"JSON"}),
    ],
)
def test_bad_files_are_bad_rows_by_kind(tmp_path: Path, name: str, data: bytes, kinds: set[str]) -> None:
    (tmp_path / name).write_bytes(data)
    found = list(read_records(Source(path=str(tmp_path / name)), "conversations"))
    assert {each.kind for each in found if isinstance(each, BadRow)} == kinds


def test_a_line_too_long_is_a_bad_row_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("texts", "tables"):
        monkeypatch.setattr(f"posttrain.data.{module}.LONGEST_LINE", 100)
    source = write(tmp_path / "a.jsonl", GOOD, "x" * 1000, GOOD)
    assert [getattr(each, "kind", None) for each in read_records(source, "conversations")] == [None, "length", None]
    cells = write(tmp_path / "a.csv", "prompt,completion", "a,b", "c" * 150 + ",d", "e,f")
    assert [getattr(each, "kind", None) for each in read_records(cells, "conversations")] == [None, "length", None]


def test_texts_that_are_no_text_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    found = list(read_records(Source(path=str(tmp_path), format=Format.text), "documents"))
    assert [isinstance(each, BadRow) for each in found] == [False, True]


def test_one_bad_row_stays_one_problem_and_the_share(tmp_path: Path) -> None:
    problems = rejection(write(tmp_path / "a.jsonl", GOOD, BAD["JSON"]))
    assert len(problems) == 2
