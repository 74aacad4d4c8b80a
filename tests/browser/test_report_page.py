"""report.html in a real browser, at the width of a desk and of a phone. Run by ``make test-browser``."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from posttrain import report
from posttrain.gate.spec import DocumentScore
from posttrain.scoring.scorecard import write_scorecard
from tests.support.command import main
from tests.support.fakes import Script, only_run, run_recipe, write_project
from tests.support.judgements import sign_verdict

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "apt-get install -y chromium"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--allow-file-access-from-files",
    "--window-size=1400,1000", "--virtual-time-budget=5000",
)  # fmt: skip
ATTACK = "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"
LONG = "a_name_that_is_much_longer_than_a_phone_is_wide_and_has_no_place_to_break_" * 2
PROBE = """<script>
window.addEventListener("load", () => {
  const box = (element) => element.getBoundingClientRect();
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility());
  parent.postMessage({
    width: document.documentElement.clientWidth,
    needed: document.documentElement.scrollWidth,
    wide: shown("body *:not(svg *)").filter((e) => box(e).right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 90)),
    top: Object.fromEntries(shown("h1, h2").map((e) => [e.innerText, box(e).top])),
    curves: shown("polyline").map((e) => box(e).width),
    intervals: shown("svg.interval .bounds").map((e) => box(e).width),
    names: shown(".lifts tbody th").map((e) => box(e).width),
    texts: shown("pre.untrusted").map((e) => {
      const place = (at) => {
        const range = document.createRange();
        range.setStart(e.firstChild, at);
        range.setEnd(e.firstChild, at + 1);
        return range.getBoundingClientRect();
      };
      const text = e.textContent, [first, last] = [place(0), place(text.length - 1)];
      return [text, first.left - box(e).left, box(e).right - first.right, last.left - first.left];
    }),
    columns: new Set(shown(".comparison .pair > div").map((e) => Math.round(box(e).left))).size,
    text: document.body.innerText,
    loaded: performance.getEntriesByType("resource").map((e) => e.name),
    attacked: window.attacked === undefined ? 0 : 1,
  }, "*");
});
</script></head>"""
FRAME = """<!DOCTYPE html><body><pre id="told"></pre><script>
window.addEventListener("message", (event) => { told.textContent = JSON.stringify(event.data); });
</script><iframe src="probed.html" style="border: 0; width: %dpx; height: 900px"></iframe>"""


@pytest.fixture(scope="session")
def browser() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(f"no browser is installed ({', '.join(NAMES)}): {INSTALL}")
    return found


@pytest.fixture
def page(working_folder: Path) -> Path:
    """The report of a run that holds everything a report can hold, some of it hostile."""
    write_project(working_folder)
    run_recipe(Script())
    run = only_run()
    steps = [{"stage": "sft", "step": step, "loss": 4 / step, "lr": 1e-3, "grad_norm": 1.0} for step in range(1, 200)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    rows = [
        DocumentScore(
            system=system, digest=system, task="some", filter="none", doc_id=doc_id, document_hash="", request_hash="",
            target_hash="", metrics={"acc": float((doc_id + shift) % 2)}, response=f"{ATTACK} {LONG} {doc_id}",
            target=LONG,
        )
        for shift, system in enumerate(("base", "candidate"))
        for doc_id in range(8)
    ]  # fmt: skip
    write_scorecard(run / "stages/sft/scorecard.jsonl", rows)
    sign_verdict(run / "stages/sft")
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"recipe": f"mine {LONG}", "command": ["posttrain", LONG]}))
    sample_answers(run, "dpo")
    report.write(run)
    return run / "report.html"


def sample_answers(run: Path, stage: str) -> None:
    """Let a stage be one on policy, with hostile questions and answers in its trail."""
    folder = run / "stages" / stage / "answers"
    folder.mkdir()
    rows = []
    for step in range(1, 4):
        figures = {"reward": step / 4, "entropy": 1 / step, "clipped": 0.1, "cut": 0.5, "answer_tokens": 12.5}
        rows.append({"stage": stage, "step": step, "loss": 0.1, "lr": 1e-3, **figures})
        line = {"where": f"{LONG}.jsonl:1", "question": f"{ATTACK} {LONG}", "answer": f"{LONG} {step}", "ended": False}
        text = json.dumps({**line, "reward": step / 4}) + "\n"
        (folder / f"step-{step:08d}.jsonl").write_text(text)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def spell_out(verdict: Path) -> None:
    """Give every task of a verdict what takes the most room in the table: long scores, and a bootstrap beside them."""
    content = json.loads(verdict.read_text())
    long = {"metric": "log_likelihood_of_the_answer", "base": -2272.81, "parent": -2272.81, "candidate": -2252.15}
    bounds = {"lift": 20.66, "low": 17.27, "high": 24.25, "bootstrap_low": 17.07, "bootstrap_high": 24.02}
    for task in content["tasks"]:
        task |= long | bounds | {"method": "Student's t, corrected for skewness"}
    sign_verdict(verdict.parent, tasks=content["tasks"])


def dom(browser: str, page: Path, profile: Path) -> str:
    """The page as it stands once the browser is done with it."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.absolute().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def look(browser: str, page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What a browser shows of a page in a window of this width; scripts are let in, to look and for whoever tries."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    (folder / "probed.html").write_text(text.replace("</head>", PROBE, 1))
    (folder / "frame.html").write_text(FRAME % width)
    told = re.search(r'<pre id="told">(.*?)</pre>', dom(browser, folder / "frame.html", folder / "profile"), re.DOTALL)
    assert told is not None
    return dict(json.loads(html.unescape(told[1])))


@pytest.mark.parametrize("width", [1280, 1000, 820, 390, 320])
def test_nothing_is_wider_than_the_window(browser: str, page: Path, width: int, tmp_path: Path) -> None:
    spell_out(page.parent / "stages/sft/verdict.json")
    report.write(page.parent)
    seen = look(browser, page, width, tmp_path)
    assert seen["width"] == width
    assert seen["wide"] == []
    assert min(seen["names"]) > 100  # a word of a task's name stays whole
    assert seen["needed"] == width


@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (390, 1)])
def test_everything_is_drawn(browser: str, page: Path, width: int, columns: int, tmp_path: Path) -> None:
    seen = look(browser, page, width, tmp_path)
    (headline, *sections) = seen["top"].items()
    assert headline[0].startswith("mine")
    assert headline[1] < 100
    assert [name for name, _ in sections] == [
        "Lift", "Training", "Data", "Cost", "Documents that changed", "Lineage", "Reproduce",
    ]  # fmt: skip
    tops = [top for _, top in seen["top"].items()]
    assert tops == sorted(tops)
    assert len(seen["curves"]) == 2 + 2 + 5  # loss and lr of both, and rewards; grad_norm waits in a closed part
    assert all(drawn > width / 4 for drawn in seen["curves"])
    assert len(seen["intervals"]) == 2 * 3
    assert max(seen["intervals"]) > 20
    assert seen["columns"] == columns
    for words in (
        "2 of 2 stages promoted",
        "+50.0 [+40.0, +60.0]",
        "4 worse",
        "4 better",
        "posttrain",
        "highest reward",
        "never ended",
    ):
        assert words in seen["text"]


def test_figures_of_the_leaderboard_are_named_where_a_phone_shows_no_head(
    browser: str, page: Path, tmp_path: Path
) -> None:
    assert main("leaderboard", "--html") == 0
    board = Path("runs/leaderboard.html")
    text = dom(browser, board, tmp_path / "profile")
    assert all(f'data-label="{name}"' in text for name in ("recipe", "n", "score", "lift over base", "verdict"))
    assert look(browser, board, 375, tmp_path)["wide"] == []


def test_answers_are_shown_and_do_nothing(browser: str, page: Path, tmp_path: Path) -> None:
    seen = look(browser, page, 1280, tmp_path)
    assert ATTACK in seen["text"]
    assert seen["attacked"] == 0
    assert seen["loaded"] == []


@pytest.mark.parametrize("width", [1280, 375])
def test_a_text_begins_and_ends_at_the_sides_of_its_script(
    browser: str, page: Path, width: int, tmp_path: Path
) -> None:
    """Hebrew and Arabic from right to left, their last stop at the left, whatever their embedded words are."""
    texts = ("\u05d0\u05d1 (Paris) \u05d2.", "\u0643\u0645 6 \u061f", "From left (\u05d0) on.")
    folder = page.parent / "stages/sft"
    rows = [
        DocumentScore(
            system=system, digest=system, task="some", filter="none", doc_id=doc_id, document_hash="", request_hash="",
            target_hash="", metrics={"acc": float(system == "base")}, response=text, target=text,
        )
        for system in ("base", "candidate")
        for doc_id, text in enumerate(texts)
    ]  # fmt: skip
    write_scorecard(folder / "scorecard.jsonl", rows)
    sign_verdict(folder)
    report.write(page.parent)
    seen = [found for found in look(browser, page, width, tmp_path)["texts"] if found[0] in texts]
    assert {text for text, *_ in seen} == set(texts)
    for text, left, right, progress in seen:
        from_right = text != texts[2]
        assert (right < left) == from_right
        assert (progress < 0) == from_right


def test_a_script_that_got_in_would_not_run(browser: str, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</h1>", "</h1><script>document.title = 'attacked'</script>", 1))
    assert "<title>attacked</title>" not in dom(browser, broken, tmp_path / "profile")
    open_to_all = tmp_path / "open.html"
    open_to_all.write_text(broken.read_text().replace("Content-Security-Policy", "X-Other"))
    assert "<title>attacked</title>" in dom(browser, open_to_all, tmp_path / "profile")
