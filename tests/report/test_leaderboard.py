"""The leaderboard: what is ranked, in which order, and what is never put side by side."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.ledger import lifts
from posttrain.report.leaderboard import Board, boards
from tests.support.command import complete, main
from tests.support.fakes import Script, run_recipe, write_project
from tests.support.judgements import add


def board(root: str = "runs") -> Board:
    """The only board."""
    (found,) = boards(row.lift for row in lifts(Path(root)))
    return found


def names(found: Board) -> list[str]:
    return [entry.name for entry in found.entries]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main("leaderboard", *words) == 0
    return capsys.readouterr().out


def test_artifacts_are_ranked_beside_their_base() -> None:
    for run, score in (("weak", 0.05), ("strong", 0.6), ("middle", 0.3)):
        add(run, tasks=1, candidate=score)
    found = board()
    assert [entry.score for entry in found.entries] == [0.6, 0.3, 0.1, 0.05]
    assert [entry.lineage for entry in found.entries] == ["sft", "sft", "base", "sft"]
    assert (found.n, found.task, found.metric) == (100, "task0", "acc")


def test_where_less_is_better_the_least_comes_first() -> None:
    for run, score in (("weak", 20.0), ("strong", 2.0)):
        add(run, tasks=1, base=10.0, candidate=score, higher_is_better=False)
    assert [entry.score for entry in board().entries] == [2.0, 10.0, 20.0]


def test_an_artifact_that_was_judged_again_stands_there_once_with_its_last_verdict() -> None:
    for state in ("undecided", "pass"):
        add("run", tasks=1, state=state)
    (entry,) = [entry for entry in board().entries if entry.lineage != "base"]
    assert entry.verdict == "pass"


@pytest.mark.parametrize("order", [("base", "parent"), ("parent", "base")])
def test_the_lift_is_that_over_the_base(order: tuple[str, str]) -> None:
    for against in order:
        add("run", tasks=1, against=against, lift={"base": 0.5, "parent": 0.2}[against])
    (entry,) = [entry for entry in board().entries if entry.lineage != "base"]
    assert entry.lift == 0.5


def test_an_artifact_that_was_never_compared_with_its_base_has_no_lift_over_it() -> None:
    add("run", tasks=1, against="parent")
    (entry,) = [entry for entry in board().entries if entry.lineage != "base"]
    assert (entry.score, entry.lift) == (0.6, None)


def test_an_artifact_that_was_held_to_a_limit_stands_beside_its_base() -> None:
    add("run", tasks=1, against="threshold", role="limit")
    assert [(entry.lineage, entry.score, entry.lift) for entry in board().entries] == [
        ("sft", 0.6, None),
        ("base", 0.1, None),
    ]


def test_scores_that_cannot_be_compared_are_never_in_one_board(capsys: pytest.CaptureFixture[str]) -> None:
    add("first", tasks=1, n=100, questions="a")
    add("second", tasks=1, n=20, questions="b", candidate=0.9)
    found = boards(row.lift for row in lifts(Path("runs")))
    assert [(one.questions, one.n, len(one.entries)) for one in found] == [("b", 20, 2), ("a", 100, 2)]
    for words in ([], ["--format", "markdown"]):
        text = printed(capsys, *words)
        newer, told, older = text.partition("Other documents or settings")
        assert told
        assert "20 documents" in newer
        assert "90.0" in newer
        assert "100 documents" in older
        assert "90.0" not in older


def test_the_table_fits_a_terminal_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    add("run-with-a-long-name" * 3, tasks=3, low=-1.0, lift=-0.999, high=0.0)
    text = printed(capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "-99.9 [-100.0, +0.0]" in text


def test_the_forms_of_the_leaderboard_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    add("run", stage="a|b", tasks=2)
    found: list[dict[str, Any]] = json.loads(printed(capsys, "--format=json"))
    assert [one["task"] for one in found] == ["task0", "task1"]
    assert found[0]["entries"][0]["lift"] == 0.5
    markdown = printed(capsys, "--format", "markdown", "task=task1")
    assert "task0" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}
    assert "| mine a\\|b | sft | 100 | 60.0 | +50.0 [+40.0, +60.0] | pass |" in markdown


def test_the_runs_of_the_pipeline_stand_in_the_leaderboard(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(working_folder)
    run_recipe(Script(), "output_root=elsewhere")
    text = printed(capsys, "output_root=elsewhere")
    for words in ("some: acc, 100 documents", "mine sft", "mine dpo", "sft>dpo", "+50.0 [+40.0, +60.0]", "pass"):
        assert words in text


def test_the_terminal_shows_the_first_entries_and_says_how_many_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(60):
        add(f"run{number}", tasks=1, candidate=number / 100)
    assert "11 more: top=61 shows them" in printed(capsys)
    text = printed(capsys, "top=2")
    assert "59 more" in text
    assert [score for score in ("59.0", "58.0", "57.0") if score in text] == ["59.0", "58.0"]
    assert printed(capsys, "top=2", "--format=markdown").count("| mine sft |") == 2
    assert printed(capsys, "--format=markdown").count("| mine sft |") == 60


def page_data(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    data = text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return list(json.loads(data))


def test_the_page_holds_every_entry_with_its_report_and_names(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(working_folder)
    run_recipe(Script())
    (run,) = Path("runs").glob("mine-*")
    digest = json.loads((run / "stages" / "dpo" / "artifact" / "manifest.json").read_text())["digest"]
    assert main("promote", "best", digest) == 0
    assert printed(capsys, "--html") == "runs/leaderboard.html\n"
    (found,) = page_data(Path("runs/leaderboard.html"))
    assert (found["task"], found["title"]) == ("some", "some: acc, 100 documents")
    assert [row["base"] for row in found["rows"]].count(True) == 1
    reports = {row["report"] for row in found["rows"] if not row["base"]}
    assert reports == {f"{run.name}/report.html"}
    assert (Path("runs") / reports.pop()).is_file()
    assert "best" in "".join(row["cells"][7] for row in found["rows"])
    assert [row["keys"][1] for row in found["rows"]] == sorted((row["keys"][1] for row in found["rows"]), reverse=True)


def test_the_page_runs_its_own_script_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    add("run", tasks=1, metric=evil)
    printed(capsys, "--html")
    text = Path("runs/leaderboard.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text
    assert evil in page_data(Path("runs/leaderboard.html"))[0]["title"]
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text
    assert "innerHTML" not in script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["task=tsak0"], "Did you mean task0?"),
        (["task0"], "posttrain leaderboard task=task0"),
        (["tsk=task0"], "Did you mean task?"),
        (["--format", "html"], "Available: json, markdown, table"),
        (["--format"], "Available: json, markdown, table"),
        (["--markdown"], "Available: --format"),
        (["top=0"], "is no number of entries"),
        (["top=all"], "is no number of entries"),
        (["output_root=nowhere"], "no results recorded yet"),
    ],
)
def test_bad_words(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    add("run", tasks=1)
    assert main("leaderboard", *words) == 2
    assert expected in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_completion_of_the_commands() -> None:
    assert complete("posttrain le") == ["leaderboard", "ledger"]
    assert complete("posttrain ledger ") == ["export", "rebuild", "verify"]
    assert complete("posttrain ledger re") == ["rebuild"]
