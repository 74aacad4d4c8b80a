"""The page of a preparation: its counts, its rows side by side, and nothing of a stranger's that a browser obeys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from posttrain.config.preparation import Action, BalanceConfig, PrepareConfig
from posttrain.data.records import Conversation
from posttrain.prepare import kept as cache
from posttrain.prepare.contamination import GateDocument
from posttrain.prepare.filters import Finding
from posttrain.prepare.kept import Kept
from posttrain.prepare.ledger import Summary, Touched, Waterfall
from posttrain.prepare.preparation import Preparation
from posttrain.prepare.rows import Row
from posttrain.prepare.rules import QUALITY
from posttrain.report import audit, rows
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
    return audit_page(
        "mine, sft", done, replace(done.summary, tokens_per_character=[0.25]), records, 0.8, ["look at this"]
    )


def cells(table: str) -> list[list[str]]:
    rows = re.findall("<tr>.*?</tr>", table.partition("<tbody>")[2], re.DOTALL)
    return [re.findall("<t[dh][^>]*>(?:<span[^>]*>)?([^<]*)", row) for row in rows]


def test_the_counts_are_those_of_the_ledger_in_rows_and_tokens(
    page: str, records: list[Conversation], done: Kept
) -> None:
    by_source, waterfall, tasks = re.findall("<table.*?</table>", page, re.DOTALL)[:3]
    sizes = [len(each.messages[0]["content"] + each.messages[1]["content"]) + 2 for each in records]
    kept = sum(sizes[at] for at in (0, 2, 5))
    assert cells(by_source)[0][:5] == ["data", "6", "3", f"{sum(sizes) / 4:,.0f}", f"{kept / 4:,.0f}"]
    assert [row[:4] for row in cells(waterfall)] == [
        ["contamination", "1", f"{sizes[4] / 4:,.0f}", "5"],
        ["exact", "1", f"{sizes[1] / 4:,.0f}", "4"],
        ["near", "1", f"{sizes[3] / 4:,.0f}", "3"],
    ]
    assert cells(tasks) == [["&lt;b&gt;task&lt;/b&gt;", "1", "1", "100.0%"]]
    total = sum(done.summary.sources[0].dropped_characters.values()) + done.summary.sources[0].kept_characters
    assert total == done.summary.sources[0].characters == sum(sizes)


def test_rows_of_several_sources_add_up_and_say_what_to_look_at() -> None:
    one = Waterfall(source="a", read=100, kept=40, dropped={"refusal": 60}, characters=1000, kept_characters=400,
                    kept_answers=100, dropped_characters={"refusal": 600})  # fmt: skip
    two = Waterfall(source="b", read=100, kept=100, dropped={}, characters=500, kept_characters=500, kept_answers=500)
    summary = Summary(
        read=200, kept=140, dropped={"refusal": 60}, found={"refusal": 60, "short": 9}, sources=[one, two],
        tasks={"gsm": Touched(documents=100, touched=3)}, tokens_per_character=[0.5, 1.0],
    )  # fmt: skip
    both, first, second = rows.sources(summary)
    assert (both.source, both.read_tokens, both.kept_tokens, both.trained) == ("all sources", "1,000", "700", "67%")
    assert [(fall.rule, fall.tokens, fall.left, fall.percent) for fall in both.falls] == [("refusal", "300", 140, 70.0)]
    assert (first.trained, second.trained, second.falls) == ("25%", "100%", [])
    said = "\n".join(rows.advice(summary))
    for line in (
        "9 rows with the finding short",
        "refusal leaves out 30%",
        "3.0% of the documents of gsm",
        "a keeps 40 of 100",
    ):
        assert line in said
    assert rows.sources(replace(summary, tokens_per_character=[]))[0].read_tokens == ""


def test_pairs_stand_side_by_side_with_the_words_that_differ_marked(page: str) -> None:
    near = page.partition("<h3>near")[2].partition("<h3>")[0]
    assert "train.jsonl:3" in near
    assert "train.jsonl:2" in near
    assert [unescape(each).strip() for each in re.findall("<mark>(.*?)</mark>", near)] == ["edited", "word339"]


def test_what_a_gate_asks_is_marked_in_the_row(page: str) -> None:
    found = page.partition("<h3>contamination")[2].partition("<h3>")[0]
    row, document = re.findall("<mark>(.*?)</mark>", found)
    assert row == document
    assert row.startswith("word405 word406")
    assert "&lt;b&gt;task&lt;/b&gt;, document 7" in found


def test_what_strangers_wrote_is_text(page: str) -> None:
    assert page.count("alert(1)") >= 1
    assert not re.search(r"<(script|img|b)\b", page)
    assert "\u202e" not in page
    assert "{{ 7 * 7 }}" in page
    assert re.findall("<mark>(please rate)</mark>", page)
    assert "default-src 'none'" in page


def test_languages_of_the_rows_that_stay_are_told(
    records: list[Conversation], done: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    german = "Der Fluss fließt durch das Tal, und die Leute, die dort wohnen, bauen ihre Häuser aus Holz und aus Stein."
    told = [*records[:2], record(2, "wo", german), *records[3:]]
    section = audit_page("a", done, done.summary, told, 0.8, []).partition('<section id="languages">')[2]
    assert re.findall("<tr><th[^>]*>(.*?)</th><td>(.*?)</td>", section) == [("too short to tell", "2"), ("de", "1")]
    monkeypatch.setattr(audit, "is_installed", lambda: False)
    section = audit_page("a", done, done.summary, told, 0.8, []).partition('<section id="languages">')[2]
    assert "posttrain[language]" in unescape(section)


def test_advice_names_what_is_found_often_and_trained(page: str) -> None:
    assert "look at this" in page
    assert "prepare.rules.rating=drop" in page


def test_evidence_is_found_whatever_stands_between_its_words() -> None:
    assert mark("Is it RED, or blue?", "red or") == [("Is it ", False), ("RED, or", True), (" blue?", False)]
    assert mark("one", "two") == [("one", False), ("two", True)]
    assert mark("5 or 6? 5", "5", 3) == [("5 or 6? ", False), ("5", True)]
    assert mark("one", "") == [("one", False)]


def test_of_the_evidence_the_words_that_are_the_fault_are_marked() -> None:
    text = "Dear Ms Rose, please write your name here: [Your  Name], and send it back."
    assert mark(text, "…write your name here: [Your Name], and send…", 0, "[Your Name]") == [
        (text[:43], False),
        ("[Your  Name]", True),
        (text[55:], False),
    ]
    assert mark("a </s>", "a </s>", 0, "</s>") == [("a ", False), ("</s>", True)]
    assert mark("so it is", "it is", 0, "absent") == [("so ", False), ("it is", True)]
    declining = "I am sorry, but I cannot help with that. " * 2 + "<|im_end|> As an AI I ask [Your Name] for it"
    cut = "word " * 41 + ". and then it sto"
    for rule, answer in [
        *((rule, declining) for rule in ("marker", "placeholder", "boilerplate", "refusal")),
        ("cut_off", cut),
    ]:
        (finding,) = QUALITY[rule].judge([Row(record(0, "a", answer))])
        assert finding is not None, rule
        assert 0 < len(finding.marked) < len(finding.evidence)
        assert finding.marked in finding.evidence, rule


def test_what_stands_around_the_evidence_is_cut() -> None:
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
