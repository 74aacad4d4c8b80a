"""The reports of a run: what they show, that they survive what is missing, and that nothing in them can act."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import report
from posttrain.context import StageContext
from posttrain.errors import GateFailed, Interrupted, PluginFailed
from posttrain.gate.spec import DocumentScore, Verdict
from posttrain.report.curves import marks, thin
from posttrain.report.figures import data_figures
from posttrain.report.page import breakable, page
from posttrain.report.run import RunReport, StageReport
from posttrain.run.directory import RunState, StageState
from posttrain.scoring.scorecard import write_scorecard
from tests.support.command import main
from tests.support.fakes import GATES, Script, only_run, run_recipe, write_project
from tests.support.judgements import sign_verdict, task_verdict
from tests.support.pages import Page, read_page

HOSTILE = '</pre><script>alert("1")</script><img src=x onerror=alert(2)>"\'{{ 7 * 7 }} \ud800 \u202e'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of two stages has ended well."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        write_project(folder)
        run_recipe(Script())
    return folder


@pytest.fixture
def run(finished: Path, working_folder: Path) -> Path:
    """The directory of that run, to do with it whatever a test likes."""
    shutil.copytree(finished, working_folder, dirs_exist_ok=True)
    return only_run()


def written(run: Path) -> Page:
    report.write(run)
    return read_page((run / "report.html").read_text())


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_tasks(run: Path, stage: str, **figures: Any) -> None:
    """Let a stage's verdict hold one task with these figures."""
    task = replace(task_verdict("pass"), **figures)
    sign_verdict(run / "stages" / stage, tasks=[vars(task)])


def answers(run: Path, stage: str, scores: Mapping[str, list[float]], text: str = "") -> None:
    """Let a stage's scorecard hold these scores by system, and what each system answered."""
    rows = [
        DocumentScore(
            system=system, digest=system, task="some", filter="none", doc_id=doc_id, document_hash="", request_hash="",
            target_hash="", metrics={"acc": score}, response=f"{system} says {doc_id}", target=f"right {doc_id}",
        )
        for system, found in scores.items()
        for doc_id, score in enumerate(found)
    ]  # fmt: skip
    path = run / "stages" / stage / "scorecard.jsonl"
    write_scorecard(path, rows)
    path.write_text(path.read_text().replace("says", f"says {json.dumps(text)[1:-1]}"))
    sign_verdict(path.parent)


def markdown_of(run: Path, **figures: float) -> str:
    set_tasks(run, "sft", **figures)
    report.write(run)
    return (run / "report.md").read_text()


def test_shares_are_shown_in_points(run: Path) -> None:
    text = markdown_of(run, base=0.25, parent=0.25, candidate=1.0, lift=0.75, low=0.7, high=0.8)
    assert "| sft | some (lift, n 100) | 25.0 | 25.0 | 100.0 | +75.0 [+70.0, +80.0] vs base | pass |" in text


def test_other_scores_are_shown_as_they_are(run: Path) -> None:
    text = markdown_of(run, base=-231.1, parent=-231.1, candidate=-215.5, lift=15.6, low=12.8, high=18.4)
    assert "| -231.1 | -231.1 | -215.5 | +15.6 [+12.8, +18.4] vs base | pass |" in text


def test_small_scores_keep_their_digits(run: Path) -> None:
    text = markdown_of(run, base=1.9123, parent=1.82, candidate=1.7, lift=0.2123, low=-0.00001, high=0.4)
    assert "| 1.912 | 1.82 | 1.7 | +0.2123 [-1e-05, +0.4] vs base | pass |" in text


def test_a_report_can_be_made_of_a_run_that_has_not_ended(run: Path) -> None:
    state = json.loads((run / "run.json").read_text())
    state["stages"][1] |= {"state": "pending", "verdict": None, "seconds": None, "tokens": None}
    (run / "run.json").write_text(json.dumps(state))
    shutil.rmtree(run / "stages/dpo")
    shown = written(run)
    assert "| dpo |  |  |  |  |  | pending |  |  |" in (run / "report.md").read_text()
    assert "Not judged: the stage is pending." in shown.words


def test_the_page_tells_the_verdict_first_and_then_everything_else(run: Path) -> None:
    left = written(run).words
    order = [
        "mine done", "2 of 2 stages promoted", "sft promoted sft is a pass", "dpo promoted dpo is a pass",
        "some lift, acc, n 100", "10.0 10.0 60.0", "+50.0 [+40.0, +60.0] against base, bounds at 95 %", "needs > +0.0",
        "Training sft", "Cost stage", "Documents that changed", "Lineage base", "Reproduce posttrain recipe=mine",
    ]  # fmt: skip
    for text in order:
        assert text in left, text
        left = left.partition(text)[2]


def test_the_command_can_be_pasted_into_a_shell(run: Path) -> None:
    command = next(line for line in map(str.strip, written(run).text.splitlines()) if line.startswith("posttrain rec"))
    assert shlex.split(command) == ["posttrain", "recipe=mine", *GATES]


def test_the_lineage_leads_from_the_base_through_every_stage(run: Path) -> None:
    state = json.loads((run / "run.json").read_text())
    lineage = written(run).words.rpartition("Lineage")[2]
    base = json.loads((run / "stages/sft/artifact/manifest.json").read_text())["base"]["digest"]
    for text in (base, *(stage["digest"] for stage in state["stages"]), "trained from base", "trained from sft"):
        assert text in lineage


def test_a_run_that_started_from_an_artifact_names_it(run: Path) -> None:
    sft = json.loads((run / "run.json").read_text())["stages"][0]["digest"]
    script = Script()
    other = run_recipe(script, "stages=[dpo]", f"start_from={run / 'stages/sft/artifact'}", "output_root=other").path
    assert f"trained from artifact {sft}" in written(other).words


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),  # the name of the stage, and so of a folder
    st.text(),
    st.text(),
    st.tuples(*[st.floats(-1e6, 1e6)] * 7),
    st.sampled_from(["pass", "fail", "undecided"]),
)
@settings(max_examples=50, deadline=None)
def test_whatever_a_verdict_says_the_page_is_well_formed(
    task: str, metric: str, reason: str, numbers: tuple[float, ...], state: Any
) -> None:
    names = ("base", "parent", "candidate", "lift", "low", "high", "threshold")
    judged = replace(task_verdict(state), task=task, metric=metric, **dict(zip(names, numbers, strict=True)))  # type: ignore[arg-type]
    stage = StageReport(
        entry=StageState(name=task, kind=metric, verdict=state),
        verdict=Verdict(state=state, gated=True, tasks=(judged,), reason=reason),
        manifest={"base": {"name": reason}, "metrics": {metric: task}, "config": {"sequence_length": metric}},
        metrics={metric: [(1, numbers[0])], "loss": list(enumerate(numbers))},
    )
    found = RunReport(path=Path(task), run=RunState(recipe=reason, command=[task, metric]), stages=(stage,))
    shown = read_page(page(found))
    assert len(shown.all("polyline", data_name="loss")[0]["points"].split()) == len(numbers)
    assert len(shown.all("circle")) == 1


def test_an_interval_is_drawn_where_its_figures_lie(run: Path) -> None:
    set_tasks(run, "sft", low=0.4, lift=0.5, high=0.8, threshold=0.2)
    plot = written(run).tags
    start = next(index for index, (tag, found) in enumerate(plot) if found.get("class") == "interval good")
    lines = [found for tag, found in plot[start : start + 20] if tag == "line"]
    (threshold,) = [line for line in lines if line["class"] == "threshold"]
    bounds = next(line for line in lines if line["class"] == "bounds")
    dot = next(found for tag, found in plot[start:] if tag == "circle")
    zero = next(line for line in lines if line["class"] == "zero")
    places = [float(text.rstrip("%")) for text in (threshold["x1"], bounds["x1"], dot["cx"], bounds["x2"])]
    origin = float(zero["x1"].rstrip("%"))
    widths = [place - origin for place in places]
    assert widths == pytest.approx([0.2 / 0.8 * widths[-1], 0.4 / 0.8 * widths[-1], 0.5 / 0.8 * widths[-1], widths[-1]])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.31, 0.69, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (0, 1e-4, [0, 5e-5, 1e-4]),
        (12.01, 12.04, [12.01, 12.02, 12.03, 12.04]),
        (2, 2, [1, 1.5, 2, 2.5, 3]),
        (0, 0, [-0.5, 0, 0.5]),
    ],
)
def test_marks(low: float, high: float, expected: list[float]) -> None:
    assert marks(low, high) == expected


def test_curves_hold_every_step(run: Path) -> None:
    rows = [{"stage": "sft", "step": step, "loss": 4.0 / step, "lr": 1e-3, "tokens": 7} for step in range(1, 101)]
    rows += [{"stage": "sft", "step": step, "eval_loss": 5.0 / step} for step in (50, 100)]
    rows.append({"stage": "sft", "step": 101, "loss": float("nan"), "lr": 1e-3})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "sft", "st')
    shown = written(run)
    (loss,), (eval_loss,) = shown.all("polyline", data_name="loss"), shown.all("polyline", data_name="eval_loss")
    points = [tuple(map(float, point.split(","))) for point in loss["points"].split()]
    assert len(points) == 100
    assert [x for x, _ in points] == pytest.approx([1000 * step / 99 for step in range(100)], abs=0.06)
    heights = [y for _, y in points]
    assert heights == sorted(heights)  # a loss that falls is drawn downwards, and y grows downwards
    assert len(eval_loss["points"].split()) == 2
    assert not shown.all("polyline", data_name="tokens")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500), st.integers(4, 60))
def test_a_thinned_curve_keeps_its_peaks(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = thin(points, most)
    assert len(kept) <= max(most, 4)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert (min(value for _, value in kept), max(value for _, value in kept)) == (min(values), max(values))


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_marks_are_round_and_reach_around_the_values(low: float, width: float) -> None:
    found = marks(low, low + width)
    slack = 1e-6 * max(abs(low), width) + 1e-29
    assert found[0] <= low + slack
    assert found[-1] >= low + width - slack
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 7


@pytest.mark.parametrize(("higher_is_better", "worse"), [(True, "candidate says  1"), (False, "candidate says  0")])
def test_documents_that_got_worse_and_better_stand_side_by_side(run: Path, higher_is_better: bool, worse: str) -> None:
    set_tasks(run, "sft", higher_is_better=higher_is_better)
    answers(run, "sft", {"base": [0, 1, 1, 0], "candidate": [1, 0, 1, 0]})
    (run / "stages/sft/questions.jsonl").write_text(
        "".join(json.dumps({"task": "some", "doc_id": doc_id, "prompt": f"asked {doc_id}"}) + "\n" for doc_id in (0, 1))
    )
    words = written(run).words
    assert "some against base: 1 worse, 1 better, 2 as good" in words
    shown = words.partition("The 1 that got worse")[2].partition("The 1 that got better")[0]
    number = worse[-1]
    assert f"asked asked {number} expected right {number}" in shown
    assert f"base says {number}" in shown.replace("  ", " ")
    assert worse.replace("  ", " ") in shown


def test_what_models_and_data_wrote_cannot_act(run: Path) -> None:
    set_tasks(run, "sft", task="some", metric="acc")
    answers(run, "sft", {"base": [1.0], "candidate": [0.0]}, HOSTILE)
    sign_verdict(run / "stages/sft", reason=HOSTILE)
    change(run / "run.json", recipe=HOSTILE)
    (run / "recipe.yaml").write_text("note: '</pre><script>alert(1)</script>'")
    shown = written(run)
    assert shown.words.count('<script>alert("1")</script>') >= 4
    assert "{{ 7 * 7 }}" in shown.words
    isolated = [found for tag, found in shown.tags if tag == "pre" and found.get("class") == "untrusted"]
    assert isolated
    assert "unicode-bidi: plaintext" in shown.styles  # isolated, in the direction that it begins with


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(run: Path, scheme: int) -> None:
    block = written(run).styles.split(":root {")[1 + scheme].partition("}")[0]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    pairs = [(ink, paper) for ink in ("ink", "quiet", "good", "bad", "warn", "first") for paper in ("paper", "panel")]
    pairs += [(tone, f"{tone}-tint") for tone in ("good", "bad", "warn")]
    pairs += [("ink", "good-tint"), ("ink", "bad-tint")]
    for text, behind in pairs:
        low, high = sorted((luminance(colours[text]), luminance(colours[behind])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {behind}"


def test_long_answers_are_cut_and_say_so(run: Path) -> None:
    answers(run, "sft", {"base": [1.0], "candidate": [0.0]}, "x" * 10_000)
    assert "more characters)" in written(run).words
    assert len((run / "report.html").read_text()) < 60_000


MISSING = {
    "no verdict": ("stages/sft/verdict.json", None, "Not in this report: the verdict: there is none"),
    "odd metrics": (
        "metrics.jsonl", f'{{"stage": "sft", "step": 1, "loss": 1{"0" * 400}, "lr": true}}\n[]\n3', "holds no step",
    ),
    "no metrics": ("metrics.jsonl", None, "metrics.jsonl holds no step of this stage"),
    "metrics of zeros": ("metrics.jsonl", "\0" * 100, "metrics.jsonl holds no step of this stage"),
    "torn questions": ("stages/sft/questions.jsonl", "{", "questions.jsonl:1 is damaged"),
    "no recipe": ("recipe.yaml", None, "Reproduce"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_said_and_the_rest_is_shown(run: Path, case: str) -> None:
    name, content, expected = MISSING[case]
    answers(run, "sft", {"base": [1.0], "candidate": [0.0]})
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_text(content)
    words = written(run).words
    assert expected in words
    assert "dpo promoted dpo is a pass" in words
    assert main("report", str(run)) == 0


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (Interrupted("stopped"), "mine interrupted 1 of 2 stages promoted. The run was interrupted"),
        (RuntimeError("out of <b>order</b>"), "RuntimeError: out of <b>order</b>"),
    ],
)
def test_a_run_that_did_not_end_well_has_its_report(working_folder: Path, raised: Exception, shown: str) -> None:
    write_project(working_folder)
    script = Script()

    def failing(context: StageContext) -> None:
        if context.name == "dpo":
            raise raised

    script.during_training = failing
    with pytest.raises((Interrupted, PluginFailed)):
        run_recipe(script)
    words = read_page((only_run() / "report.html").read_text()).words
    assert shown in words
    assert "sft promoted sft is a pass" in words


def test_the_command_makes_the_reports_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("report.html", "report.md"):
        (run / name).unlink()
    assert main("report") == 0
    assert capsys.readouterr().out.rstrip().endswith(str(run / "report.html"))
    read_page((run / "report.html").read_text())
    assert (run / "report.md").exists()


def test_a_directory_that_cannot_be_written_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert main("report", run.name) == 2
    captured = capsys.readouterr()
    assert "mine: done" in captured.out
    assert f"error: {run}: cannot write the reports:" in captured.err


def test_a_failed_gate_has_its_reason_at_the_top(working_folder: Path) -> None:
    write_project(working_folder)
    script = Script()
    script.verdicts["sft"] = "fail"
    with pytest.raises(GateFailed):
        run_recipe(script)
    words = read_page((only_run() / "report.html").read_text()).words
    assert "mine gate failed 0 of 2 stages promoted. A gate failed an artifact" in words
    assert "sft gate failed sft is a fail" in words


def test_what_went_on_by_the_recipe_is_said_with_its_policy(working_folder: Path) -> None:
    write_project(working_folder)
    script = Script()
    script.verdicts["sft"] = "undecided"
    run_recipe(script, "sft.gate.on_undecided=warn", "stages=[sft]")
    told = "not promoted, and by on_undecided: warn the run went on from it"
    assert told in read_page((only_run() / "report.html").read_text()).words
    assert "warn the run went on from it" in (only_run() / "report.md").read_text()


def test_a_report_is_there_after_every_stage(working_folder: Path) -> None:
    write_project(working_folder)
    seen = []

    def looking(context: StageContext) -> None:
        if context.name == "dpo":
            seen.append((only_run() / "report.html").read_text())

    script = Script()
    script.during_training = looking
    run_recipe(script)
    assert "sft promoted sft is a pass" in read_page(seen[0]).words


def test_a_stage_without_a_gate_says_so(working_folder: Path) -> None:
    write_project(working_folder)
    script = Script()
    run_recipe(script, "stages=[sft]")
    sign_verdict(only_run() / "stages/sft", tasks=[], gated=False, reason="the recipe switched this gate off")
    assert "Promoted without evaluation: the recipe switched this gate off." in written(only_run()).words


def test_warnings_and_the_eval_loss_are_in_every_report(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(working_folder)
    script, warning = Script(), "the loss [sft] rises again after step 3"
    script.during_training = lambda context: context.metrics.update(warnings=[warning], eval_loss=1.25)
    run = run_recipe(script, "stages=[sft]").path
    page_words = written(run).words
    report.show(run)
    for text in (page_words, (run / "report.md").read_text(), capsys.readouterr().out):
        assert "eval loss 1.2500" in text
        assert warning in text


def test_what_training_reached_is_a_line_for_each_kind_of_matrix() -> None:
    counts = {"weights": 600, "trained_matrices": 2, "trained_weights": 300, "four_bit_weights": 150, "matrices": 4}
    whole = {"kind": "embeddings", **dict.fromkeys(counts, 0), "matrices": 1, "weights": 400}
    stage = StageReport(
        entry=StageState(name="sft", kind="sft"),
        manifest={"metrics": {"reach": [{"kind": "experts", **counts}, whole, {"kind": "foreign"}]}},
    )
    assert data_figures(stage) == [
        ("trained experts", "2 of 4, 30.0% of all weights, 25% in 4 bits"),
        ("trained embeddings", "0 of 1, 0.0% of all weights"),
    ]
    assert data_figures(replace(stage, manifest={"metrics": {"reach": "everything"}})) == [("reach", "everything")]


def test_a_name_breaks_between_its_words_alone() -> None:
    assert breakable("towns_documents") == "towns_<wbr>documents"
    assert breakable("a/b.c-<x>") == "a/<wbr>b.<wbr>c-<wbr>&lt;x&gt;"
    longest = max(map(len, breakable("x" * 300).split("<wbr>")))
    assert longest <= 24
