"""Names, paths, answers and reasons of strangers, through the output of every command: none is obeyed."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from posttrain import cli
from posttrain.config.help import Setting
from posttrain.console import DataConsole, styled
from posttrain.gate.spec import Verdict
from posttrain.host import plugins
from posttrain.quoting import cell, document, lines, markdown, one_line, quoted_streams
from posttrain.run.display import Display, Ticker
from tests.support.fakes import GATES, Script, run_recipe, scripted_host, write_project
from tests.support.judgements import task_verdict

EVIL = (
    "[red]", "[/]", "[bold]x", "[link=file:///etc/passwd]click[/link]", "[/red]", "\\[b]", ":warning:",
    "\x1b[31m", "\x1b]8;;http://evil\x1b\\x\x1b]8;;\x1b\\", "\x1b]52;c;cHduZWQ=\x07", "\x9b2J", "\x07", "\x08\x08",
    "\r", "\0", "\x7f",
    "\u202eevil", "\u2066x\u2069", "\u200b", "\u200d", "\ufeff", "\u2028", "\u2029", "\x85", "\x0b", "\x0c",
    "\ud800", "\U000e0041",
    "|", "||", "`", "```", "<img src=x onerror=alert(1)>", "</td>", "&lt;", "](http://evil)", "![x](http://evil)",
    "[a][b]",
    "\n", "\n\n# x", "\r\n", "\t", "*", "**", "~~", "_", "]]>", "&", '"', "'",
)  # fmt: skip
HOSTILE = st.lists(st.one_of(st.sampled_from(EVIL), st.text(max_size=3)), max_size=8).map("".join)
ALL = " ".join(EVIL)


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal obeys or hides, but for line breaks and tabs."""
    return [
        f"U+{ord(each):04X}"
        for each in text
        if each not in "\n\t" and unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


@given(text=HOSTILE)
def test_what_is_quoted_is_neither_obeyed_nor_hidden(text: str) -> None:
    for quoted in (lines(text), one_line(text), markdown(text), cell(text), document(text)):
        assert obeyed(quoted) == []
    assert "\n" not in one_line(text) + markdown(text) + cell(text)
    assert one_line(one_line(text)) == one_line(text)
    assert lines(lines(text)) == lines(text)
    ElementTree.fromstring(ElementTree.tostring(element(document(text))))


def element(text: str) -> ElementTree.Element:
    found = ElementTree.Element("x")
    found.text = text
    return found


@given(texts=st.lists(HOSTILE, min_size=2, max_size=4))
def test_a_cell_of_markdown_ends_where_it_should(texts: list[str]) -> None:
    row = f"| {' | '.join(map(cell, texts))} |"
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == len(texts) + 1
    assert "<" not in row
    assert not re.search(r"(?<!\\)(?:\\\\)*\]\(", row)
    assert not re.search(r"(?<!\\)(?:\\\\)*`", row)


@given(rows=st.lists(st.tuples(HOSTILE, HOSTILE), min_size=1, max_size=4))
def test_a_table_keeps_its_columns(rows: list[tuple[str, str]]) -> None:
    shown = io.StringIO()
    console = DataConsole(file=shown, width=300, force_terminal=True, color_system="standard")
    table = Table("a", "b")
    for first, second in rows:
        table.add_row(styled((first, "red")), styled(second))
    console.print(table)
    text = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
    assert obeyed(text) == []
    widths = {cell_len(line) for line in text.splitlines() if line.strip()}
    assert len(widths) == 1, "every line ends at the same column"


@given(text=HOSTILE)
def test_bars_and_lines_of_a_run_show_data(text: str) -> None:
    shown = io.StringIO()
    display = Display(DataConsole(file=shown, width=300, force_terminal=True, color_system=None))
    display.line(text, "gate", text)
    display.console.print(text)
    display.console.rule(styled(text))
    rest = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue())
    assert obeyed(rest) == []
    assert rest.splitlines()[0].startswith(one_line(text)[:8].strip(" "))


def test_a_bar_shows_a_hostile_name() -> None:
    shown = io.StringIO()
    ticker = Ticker(Display(DataConsole(file=shown, width=300, force_terminal=True)), ALL, "[red]")
    ticker.start(3)
    ticker.advance(1, 3, ALL)
    ticker.stop()
    for bad in ("\x1b]", "\x9b", "\x07", "\u202e", "\u2028"):
        assert bad not in shown.getvalue()
    assert "[link=file:///etc/passwd]" in shown.getvalue()


def test_whatever_is_printed_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    with quoted_streams():
        print(ALL)
        Console(force_terminal=True).print(ALL, style="red", markup=False)  # of another library
        print("end")
        DataConsole(force_terminal=True, color_system="standard").print("styled", style="red")
    theirs, _, ours = capsys.readouterr().out.partition("end")
    assert obeyed(theirs) == []
    assert ours == "\n\x1b[31mstyled\x1b[0m\n"


def tame(text: str) -> str:
    """A text that can be the name of a file."""
    return text.replace("/", "").replace("\0", "").encode("utf-8", "ignore").decode()


@pytest.fixture
def hostile(working_folder: Path) -> Path:
    """A run in which every text is hostile."""
    write_project(working_folder)
    directory = run_recipe(Script())
    run = directory.path
    state = json.loads((run / "run.json").read_text())
    state["recipe"] = ALL
    state["command"] = ["posttrain", ALL]
    for stage in state["stages"]:
        stage["warnings"] = [ALL]
        stage["kind"] = ALL
    (run / "run.json").write_text(json.dumps(state))
    return run


def clean(text: str) -> bool:
    """Return True for a text that obeys nothing and shows its markup."""
    return obeyed(text) == [] and "[red]" in text


def main(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(list(words))
    found = capsys.readouterr()
    assert obeyed(found.out + found.err) == []
    assert "Traceback" not in found.err
    return found.out + found.err


def test_report_shows_hostile_texts(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clean(main(capsys, "report", str(hostile)))
    for name in ("report.md", "report.html", "junit.xml"):
        text = (hostile / name).read_text()
        assert obeyed(text) == []
        assert "<img src=x" not in text
    ElementTree.parse(hostile / "junit.xml")


def test_a_hostile_verdict_in_every_form(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.report.junit import junit
    from posttrain.report.run import read_report
    from posttrain.report.summary import summary
    from posttrain.report.table import markdown as page
    from posttrain.report.table import print_table, table_console

    task = replace(task_verdict("fail"), task=ALL, metric=ALL, reason=ALL)
    found = read_report(hostile)
    verdict = Verdict(state="fail", gated=True, tasks=(task,), reason=ALL)
    found = replace(found, stages=tuple(replace(stage, verdict=verdict) for stage in found.stages))
    print_table(found, table_console())
    assert clean(capsys.readouterr().out)
    for text in (page(found), summary(found, ()), junit(found)):
        assert obeyed(text) == []
        assert "<img src=x" not in text
    ElementTree.fromstring(junit(found))


@pytest.mark.parametrize("form", ["table", "markdown", "json"])
def test_leaderboard_shows_hostile_texts(hostile: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert obeyed(main(capsys, "leaderboard", "--format", form)) == []
    assert obeyed(main(capsys, "leaderboard", f"task={ALL}")) == []


def test_plan_tokens_and_gate_show_hostile_names(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(working_folder)
    name = tame(ALL)[:80] + ".jsonl"
    Path(name).write_text(Path("train.jsonl").read_text())
    quoted = json.dumps(name, ensure_ascii=False)
    Path("recipes/evil.yaml").write_text(Path("recipes/mine.yaml").read_text().replace("train.jsonl", json.dumps(name)))
    shown = main(capsys, "plan", "recipe=evil", *GATES)
    assert "[red]" in shown
    for words in (
        ["plan", "recipe=mine", f"sft.data={quoted}x"], ["plan", f"recipe={ALL}"], ["plan", "recipe=mine", ALL],
        ["plan", "recipe=mine", f"{ALL}=1"], ["plan", "recipe=mine", f"sft.lr='{ALL}'"], ["recipe=mine",
        f"model={ALL}"],
        ["-m", "recipe=mine", f"sft.lr={ALL}"], [ALL], ["list", ALL], ["report", ALL], ["merge", ALL, ALL],
        ["ledger", ALL],
        ["leaderboard", f"output_root={ALL}"], ["gate", f"adapter={quoted}", "gate=none"], ["new-plugin", ALL],
        ["doctor", ALL],
        ["tokens", "recipe=mine", f"sft.data={quoted}y"], ["plan", "recipe=mine", "--config-dir", ALL], ["ledger",
        "verify", f"output_root={ALL}"],
    ):  # fmt: skip
        main(capsys, *(word.replace("\0", "") for word in words))


def test_list_shows_hostile_names_and_summaries(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    (Path("recipes") / f"{tame(ALL)[:80]}.yaml").write_text(f"# {ALL}\nx: 1\n", errors="ignore")
    assert clean(main(capsys, "list", "recipes"))


def test_a_run_shows_hostile_reasons(
    working_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(working_folder)
    script = Script()
    script.during_training = lambda context: context.progress.note(ALL)
    host = scripted_host(script)
    monkeypatch.setattr(plugins, "load", lambda: host)
    assert clean(main(capsys, "recipe=mine", *GATES))


def test_the_help_of_a_stage_shows_hostile_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Setting(name=ALL, type=ALL, default=ALL, help=ALL)
    monkeypatch.setattr("posttrain.config.help.settings", lambda kind: [row])
    assert clean(main(capsys, "list", "sft"))
