"""``posttrain data``: the waterfall of rows, the same from the cache, and what a changed recipe prepares again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from sys import modules
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from posttrain import cli
from posttrain.config.schema import Source
from posttrain.data import mixing
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.host.readers import Reader
from posttrain.prepare.contamination import GateDocument
from posttrain.prepare.filters import Finding
from posttrain.prepare.plugin import QualityRule
from posttrain.prepare.rows import Row
from posttrain.run.prepared import Preparer
from tests.support.fakes import Script, only_run, run_on, scripted_host, write_project

ROWS = [
    {"prompt": "who wrote Faust", "completion": "it was Goethe"},
    {"prompt": "Who wrote  Faust", "completion": "it was Goethe"},
    {"prompt": "who painted it", "completion": "it was Klee"},
]
ALONE = ("recipe=mine", "stages=[sft]", "sft.gate.enabled=false")


@pytest.fixture(autouse=True)
def project(working_folder: Path) -> Path:
    write_project(working_folder)
    write(ROWS)
    return working_folder


def write(rows: list[dict[str, str]]) -> None:
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", *ALONE, "--json", *words])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_says_what_preparation_leaves_once_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    def planned() -> str:
        with pytest.raises(SystemExit):
            cli.main(["plan", *ALONE])
        return capsys.readouterr().out

    assert "rows   counts are before preparation: posttrain data recipe=mine shows what it leaves" in planned()
    ask(capsys)
    assert "rows   prepared: 2 of 3 rows kept; dropped: 1 exact" in planned()
    write([*ROWS, ROWS[0]])
    assert "rows   counts are before preparation" in planned()


def test_the_waterfall_is_shown_and_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask(capsys)
    assert (first["read"], first["kept"], first["dropped"]) == (3, 2, {"exact": 1})
    assert Path(first["stages"]["sft"]["ledger"]).is_file()

    def read(*_: object) -> None:
        raise AssertionError("rows were read again")

    with monkeypatch.context() as patch:
        patch.setattr(mixing, "read_rows", read)
        assert ask(capsys) == first
    changed = ask(capsys, "sft.prepare.exact=count")
    assert (changed["kept"], changed["dropped"]) == (3, {})
    write([*ROWS, {"prompt": "why", "completion": "for it is so"}])
    assert ask(capsys)["read"] == 4


def test_the_table_names_sources_rules_and_the_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", *ALONE])
    shown = capsys.readouterr().out
    assert ["train.jsonl", "3", "-1", "2"] in [line.split() for line in shown.splitlines()]
    assert "2 of 3 rows kept; dropped: 1 exact" in shown
    assert "ledger.parquet" in shown


def test_a_run_trains_the_kept_rows_by_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    script, trained = Script(), list[list[str]]()
    script.during_training = lambda context: trained.append([record.where for record in context.records])
    run_on(scripted_host(script), "stages=[sft]", "sft.data=[{path: train.jsonl, weight: 2}]")
    assert trained == [["train.jsonl:1", "train.jsonl:3"] * 2]
    manifest = json.loads((only_run() / "stages" / "sft" / "artifact" / "manifest.json").read_text())
    assert manifest["metrics"]["prepared"]["dropped"] == {"exact": 1}
    section = (only_run() / "report.html").read_text().partition('id="data"')[2].partition("</section>")[0]
    assert "2 of 3 rows kept; dropped: 1 exact" in section
    assert section.count("<table") == 2  # by source, and from read to kept


def test_lengths_are_measured_by_the_tokenizer_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save("base/tokenizer.json")
    ask(capsys)
    (lengths,) = Path("runs").glob("cache/data/*/lengths.json")
    texts = [f"{row['prompt']}\n\n{row['completion']}" for row in ROWS]
    words = sum(len(text.split()) for text in texts)
    assert json.loads(lengths.read_text())["tokens_per_character"] == [words / sum(map(len, texts))]
    page = (lengths.parent / "audit.html").read_text()
    assert f'<td data-label="tokens read">{words}</td>' in page


def test_a_stage_without_a_row_left_is_rejected() -> None:
    write([{"prompt": "a b c d", "completion": "a b c d"}])
    with pytest.raises(Exception, match=r"sft\.prepare: no row is left: 0 of 1 rows kept; dropped: 1 copied_prompt"):
        run_on(scripted_host(Script()), "stages=[sft]")


def test_rows_of_a_plugin_are_prepared_by_their_content() -> None:
    rows = mixing.read_rows([Source(path="train.jsonl")], "documents")
    script, trained = Script(), list[int]()
    script.during_training = lambda context: trained.append(len(context.records))

    class Theirs:
        @hookimpl(tryfirst=True)
        def load_records(self) -> Any:
            return rows[1:]

    host = scripted_host(script)
    host.manager.register(Theirs(), "theirs")
    run_on(host, "stages=[sft]")
    assert trained == [2]


def test_prepare_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "sft.prepare.enabled=false")
    assert (found["read"], found["stages"]) == (0, {})
    assert list(Path("runs").glob("cache/data/*/ledger.parquet")) == []


def test_a_changed_gate_prepares_again_and_trains_where_other_rows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    documents: list[GateDocument] = []
    monkeypatch.setattr(Preparer, "_documents", lambda preparer: list(documents))
    monkeypatch.setattr(Preparer, "_compares_with_gates", lambda preparer: True)
    monkeypatch.setattr(Preparer, "_gate_digests", lambda preparer: {"documents": len(documents)})
    asked = "what was the name of the man who painted the tall blue house"
    write([*ROWS, {"prompt": asked, "completion": "it was Marc"}])
    script, trained = Script(), list[int]()
    script.during_training = lambda context: trained.append(len(context.records))
    for _ in range(2):
        run_on(scripted_host(script), "stages=[sft]")
    assert trained == [3]
    documents.append(GateDocument("mine", 0, "which river is the longest of all in Africa", ""))
    run_on(scripted_host(script), "stages=[sft]")
    assert trained == [3]
    documents.append(GateDocument("mine", 1, asked, ""))
    run_on(scripted_host(script), "stages=[sft]")
    assert trained == [3, 2]
    assert only_run().is_dir()


def test_rows_alike_reach_the_stage_that_sets_some_aside() -> None:
    words = " ".join(f"word{number}" for number in range(60))
    texts = [words, words.replace("word30", "other"), "a text of its own"]
    write([{"prompt": each, "completion": "yes"} for each in texts])
    script, found = Script(), list[dict[str, int]]()
    script.during_training = lambda context: found.append(dict(context.clusters))
    for word in ("eval_share=0.4", "eval_share=0", "eval_share=0.3"):  # the last one does not read the rows again
        run_on(scripted_host(script), "stages=[sft]", "sft.prepare.near.action=count", f"sft.{word}")
    alike = {"train.jsonl:1": 0, "train.jsonl:2": 0}
    assert found == [alike, {}, alike]


def test_a_replayed_row_that_a_gate_asks_leaves_as_those_of_the_stage_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "what was the name of the man who painted the tall blue house"
    general = [{"prompt": asked, "completion": "it was Marc"}, {"prompt": "why", "completion": "for it is so"}]
    Path("general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    monkeypatch.setattr(Preparer, "_documents", lambda preparer: [GateDocument("mine", 0, asked, "")])
    words = ("sft.replay={path: general.jsonl, share: 0.2}", "sft.prepare.exact=count")
    (stage,) = ask(capsys, *words)["stages"].values()
    rows = [(each["source"], each["read"], each["kept"], each["dropped"]) for each in stage["sources"]]
    assert rows == [("train.jsonl", 3, 3, {}), ("general.jsonl", 2, 1, {"contamination": 1})]
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", *ALONE, *words, "sft.prepare.contamination.action=stop"])
    assert ended.value.code == 2
    assert "general.jsonl:1: contamination: what was the name" in capsys.readouterr().err


def test_rows_that_are_sampled_later_are_named_with_where_to_read_them(capsys: pytest.CaptureFixture[str]) -> None:
    Path("questions.jsonl").write_text(json.dumps({"question": "which tree is it", "answer": "elm"}) + "\n")
    asked = "{on_policy: {questions: questions.jsonl, reward: exact}}"
    words = ["data", "recipe=mine", "sft.gate.enabled=false", "dpo.gate.enabled=false"]
    with pytest.raises(SystemExit):
        cli.main([*words, f"dpo.data=[pairs.jsonl, {asked}]"])
    line = "the parent's answers to questions.jsonl are made and prepared when the stage starts: the run's report.html"
    assert f"dpo: {line}" in capsys.readouterr().out
    pages = [page.read_text() for page in Path("runs").glob("cache/data/*/audit.html")]
    assert ["answers to questions.jsonl" in page for page in pages].count(True) == 1
    with pytest.raises(SystemExit):
        cli.main([*words, "--json", f"dpo.data={asked}"])
    found = json.loads(capsys.readouterr().out)
    assert (found["asked"], [*found["stages"]]) == ({"dpo": ["questions.jsonl"]}, ["sft"])


def test_a_damaged_preparation_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    ask(capsys)
    (summary,) = Path("runs").glob("cache/data/*/summary.json")
    summary.write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["data", *ALONE])
    assert capsys.readouterr().out.count("prepared again") == 1


def test_a_table_that_was_cut_is_named_by_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), "rows.parquet")
    whole = Path("rows.parquet").read_bytes()
    for command in ("plan", "data"):
        Path("rows.parquet").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SystemExit) as ended:
            cli.main([command, *ALONE, "sft.data=rows.parquet"])
        shown = capsys.readouterr()
        assert ended.value.code == 2
        assert (shown.out + shown.err).count("sft.data: rows.parquet: is not a sound Parquet file") == 1


class Judging:
    """A plugin with a filter and a reader."""

    @hookimpl
    def register_filters(self) -> list[QualityRule]:
        return [Long("long")]

    @hookimpl
    def register_readers(self) -> list[Reader]:
        return [Reader(name="lines", suffix=".mine", version="1", read=lambda file: enumerate([ROWS[0]], start=1))]


class Long(QualityRule):
    """A filter that finds nothing."""

    def judge(self, rows: Sequence[Row]) -> list[Finding | None]:
        return [None for _ in rows]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), True),
        (("sft.prepare.rules.long=ignore",), False),
        (("sft.prepare.enabled=false", "sft.data=rows.mine"), True),
    ],
)
def test_the_manifest_names_the_plugins_of_filters_and_readers(
    words: tuple[str, ...], named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(modules, "judging_of_mine", Judging())  # type: ignore[arg-type]
    entry = EntryPoint(name="mine", value="judging_of_mine", group="posttrain")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*entry_points(group=group), entry])
    host = scripted_host(Script())
    Path("rows.mine").write_text("anything")
    run_on(host, "stages=[sft]", *words)
    manifest = json.loads((only_run() / "stages" / "sft" / "artifact" / "manifest.json").read_text())
    assert manifest["plugins"] == (["mine (judging_of_mine)"] if named else [])
