"""The page of a preparation: its counts, its rows side by side, and nothing of a stranger's that a browser obeys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import pytest

from posttrain.config.preparation import Action, BalanceConfig, PrepareConfig
from posttrain.data.records import Conversation
from posttrain.prepare import kept as cache
from posttrain.prepare.contamination import GateDocument
from posttrain.prepare.filters import Finding
from posttrain.prepare.kept import Kept
from posttrain.prepare.preparation import Preparation
from posttrain.prepare.rows import Row
from posttrain.report.audit import audit_page, differences, mark

HOSTILE = "</pre><script>alert(1)</script><img src=//x>\u202e{{ 7 * 7 }}"


def record(number: int, prompt: str, answer: str) -> Conversation:
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Conversation(messages=turns, where=f"train.jsonl:{number}")


def words(first: int, count: int) -> str:
    return " ".join(f"word{first + at}" for at in range(count))


def judge(rows: Sequence[Row]) -> list[Finding | None]:
    return [Finding(evidence="PLEASE rate", score=0.9) if "please rate" in row.answer else None for row in rows]


@pytest.fixture
def records() -> list[Conversation]:
    return [
        record(0, words(0, 30), words(100, 40)),
        record(1, words(0, 30).upper(), words(100, 40)),
        record(2, words(200, 30), words(300, 40)),
        record(3, words(200, 30), words(300, 39) + " edited"),
        record(4, words(400, 30), "the answer"),
        record(5, HOSTILE, f"so please rate this {HOSTILE}"),
    ]


@pytest.fixture
def done(records: list[Conversation], tmp_path: Path) -> Kept:
    preparation = Preparation(
        trained=records,
        config=PrepareConfig(),
        judges={"rating": (Action.count, judge)},
        documents=[GateDocument("<b>task</b>", 7, words(405, 20), "")],
    )
    return cache.keep(tmp_path, "key", preparation.run(), {"<b>task</b>": 1})


@pytest.fixture
def page(records: list[Conversation], done: Kept) -> str:
    return audit_page("mine, sft", done, records, 0.8, ["look at this"])


def test_the_counts_are_those_of_the_ledger(page: str) -> None:
    table = page.partition('id="rows"')[2].partition("</table>")[0]
    assert re.findall("<th scope=.col.>(.*?)</th>", table) == [
        "source", "read", "contamination", "exact", "near", "kept",
    ]  # fmt: skip
    assert re.findall("<td>(.*?)</td>", table) == ["6", "1", "1", "1", "3"]


def test_pairs_stand_side_by_side_with_the_words_that_differ_marked(page: str) -> None:
    near = page.partition("<h3>near")[2].partition("<h3>")[0]
    assert "train.jsonl:3" in near
    assert "train.jsonl:2" in near
    assert [unescape(each).strip() for each in re.findall("<mark>(.*?)</mark>", near)] == ["edited", "word339"]


def test_what_a_gate_asks_is_marked_in_the_row(page: str) -> None:
    found = page.partition("<h3>contamination")[2].partition("<h3>")[0]
    assert re.findall("<mark>(.*?)</mark>", found)[0].startswith("word405 word406")
    assert "&lt;b&gt;task&lt;/b&gt;, document 7" in found


def test_what_strangers_wrote_is_text(page: str) -> None:
    assert page.count("alert(1)") >= 1
    assert not re.search(r"<(script|img|b)\b", page)
    assert "\u202e" not in page
    assert "{{ 7 * 7 }}" in page
    assert re.findall("<mark>(please rate)</mark>", page)
    assert "default-src 'none'" in page


def test_advice_names_what_is_found_often_and_trained(page: str) -> None:
    assert "look at this" in page
    assert "prepare.rules.rating=drop" in page


def test_evidence_is_found_whatever_stands_between_its_words() -> None:
    assert mark("Is it RED, or blue?", "red or") == [("Is it ", False), ("RED, or", True), (" blue?", False)]
    assert mark("one", "two") == [("one", False), ("two", True)]
    assert mark("one", "") == [("one", False)]
    (before, marked, after) = mark("a" * 1000 + " here " + "b" * 1000, "here")
    assert (len(before[0]), marked, len(after[0])) == (301, ("here", True), 301)


def test_differences_are_marked_on_both_sides() -> None:
    assert differences("a b  c", "a x c d") == (
        [("a ", False), ("b  ", True), ("c", False)],
        [("a ", False), ("x ", True), ("c ", False), ("d", True)],
    )


def test_rows_beyond_the_caps_and_the_sample_are_in_the_ledger(records: list[Conversation]) -> None:
    config = PrepareConfig(balance=BalanceConfig(longest=69, rows=2))
    ledger = Preparation(trained=records, config=config, judges={}).run()
    rules = [None if (found := ledger.deciding(row)) is None else found.rule for row in range(len(records))]
    assert rules == ["length", "exact", "length", "near", None, None]
    config.balance = BalanceConfig(per_source=3, rows=2)
    ledger = Preparation(trained=records, config=config, judges={}).run()
    rules = [None if (found := ledger.deciding(row)) is None else found.rule for row in range(len(records))]
    assert rules.count("source") == 1
    assert rules.count("sample") == 1
    assert ledger.kept() == [row for row, rule in enumerate(rules) if rule is None]
