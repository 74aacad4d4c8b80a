"""Records of a run that somebody edited, tore or replaced: nothing false in them is believed, none ends in a bug."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sys
import types
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from posttrain import __version__, ledger
from posttrain.context import StageContext
from posttrain.digests import digest_of
from posttrain.errors import ArtifactDamaged, BadInput, GateFailed, PosttrainError
from posttrain.gate.spec import GateRequest, Scorecard, Verdict
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.host.plugins import Host
from posttrain.stage import Stage
from posttrain.testing import FakeEvaluator
from tests.support.command import main
from tests.support.fakes import only_run, run_json, run_on, states, write_adapter, write_project
from tests.support.pages import read_page


class Scores:
    """Instant stages, and a gate whose scores are invented and whose verdicts are those of the real statistics."""

    def __init__(self, candidate: float = 0.1) -> None:
        self.evaluator = FakeEvaluator({"candidate": candidate})
        self.asked: list[str] = []

    @hookimpl
    def run_stage(self, stage: Stage, context: StageContext) -> bool:
        write_adapter(context)
        context.metrics["tokens"] = 20
        return True

    @hookimpl
    def evaluate_artifact(self, request: GateRequest) -> Scorecard:
        self.asked.append(request.stage)
        return self.evaluator.evaluate_artifact(request)


def host_of(scores: Scores) -> Host:
    host = plugins.load()
    host.manager.unregister(name="scoring.plugin")
    host.manager.register(scores, "scores")
    return host


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the gate has failed the only stage of a run."""
    folder = tmp_path_factory.mktemp("failed")
    before = Path.cwd()
    os.chdir(folder)
    write_project(folder)
    with pytest.raises(GateFailed):
        run_on(host_of(Scores()), "stages=[sft]")
    os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def run(failed: Path, working_folder: Path) -> Path:
    """The directory of that run, to do with it whatever a test likes."""
    shutil.copytree(failed, working_folder, dirs_exist_ok=True)
    return only_run()


def again() -> PosttrainError:
    """The error of the same command."""
    with pytest.raises(PosttrainError) as ended:
        run_on(host_of(Scores()), "stages=[sft]")
    return ended.value


def sign(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit verdict.json as somebody does who makes its own hash anew."""
    path = folder / "verdict.json"
    record = json.loads(path.read_text())
    del record["digest"]
    change(record)
    path.write_text(json.dumps({**record, "digest": digest_of(record)}))


def replace_in(name: str, *pairs: tuple[str, str]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)

    return edit


def signed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return functools.partial(sign, change=change)


def all_pass(record: dict[str, Any]) -> None:
    record.update(state="pass", reason="every task passed")
    for task in record["tasks"]:
        task.update(state="pass", low=0.5, high=0.9, lift=0.7, candidate=0.9)


def swap_scores(folder: Path) -> Path:
    """Edit the scores alone: the candidate answers right."""
    path = folder / "scorecard.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["metrics"]["acc"] = float(row["system"] == "candidate")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drop_rows(folder: Path) -> None:
    path = folder / "scorecard.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:100]))


EDITS: Mapping[str, Callable[[Path], object]] = {
    "state": replace_in("verdict.json", ('"state": "fail"', '"state": "pass"')),
    "figure": replace_in("verdict.json", ('"candidate": 0.1', '"candidate": 0.9')),
    "judge": replace_in("verdict.json", ('"posttrain ', '"other ')),
    "signed state": signed(lambda record: record.update(state="pass")),
    "signed whole": signed(all_pass),
    "signed switched off": signed(lambda record: record.update(state="pass", gated=False, tasks=[], reason="off")),
    "signed without tasks": signed(lambda record: record.update(tasks=[])),
    "signed easier gate": signed(lambda record: (
        all_pass(record), record["basis"]["asked"][0]["tasks"]["some"].update(min_lift=-2.0)
    )),
    "signed gate off": signed(lambda record: (
        all_pass(record), record["basis"]["asked"][0]["gate"].update(enabled=False)
    )),
    "scores": swap_scores,
    "fewer scores": drop_rows,
    "verdict and scores": lambda folder: sign(swap_scores(folder), all_pass),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_verdict_never_promotes(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = len(ledger.lifts(Path("runs")))
    EDITS[name](run / "stages/sft")
    error = again()
    assert error.exit_code in (3, 5)
    if error.exit_code == 5:
        assert re.search(r"stages/sft/(verdict\.json|scorecard\.jsonl)", str(error))
        assert "Remove" in str(error)
    assert [row.lift.verdict for row in ledger.lifts(Path("runs"))] == ["fail"] * rows
    assert states() == {"sft": "gate_failed"}
    start = ("stages=[dpo]", f"start_from={run}/stages/sft/artifact", "output_root=other")
    with pytest.raises(BadInput, match=r"never judged|failed by its gate"):
        run_on(host_of(Scores(0.9)), *start)
    assert main("report", str(run)) == 5
    assert "promoted" not in capsys.readouterr().out
    assert "| pass |" not in (run / "report.md").read_text()


def test_removing_what_is_damaged_mends_it(run: Path) -> None:
    EDITS["signed state"](run / "stages/sft")
    assert isinstance(again(), ArtifactDamaged)
    (run / "stages/sft/verdict.json").unlink()
    assert isinstance(again(), GateFailed)
    assert main("report", str(run)) == 0


def test_without_its_scores_a_verdict_is_made_again(run: Path) -> None:
    (run / "stages/sft/scorecard.jsonl").unlink()
    scores = Scores()
    with pytest.raises(GateFailed):
        run_on(host_of(scores), "stages=[sft]")
    assert scores.asked == ["sft"]


def test_an_untouched_verdict_is_confirmed_without_asking_a_model(run: Path) -> None:
    before = (run / "stages/sft/verdict.json").read_bytes()
    scores = Scores()
    with pytest.raises(GateFailed):
        run_on(host_of(scores), "stages=[sft]")
    assert scores.asked == []
    assert (run / "stages/sft/verdict.json").read_bytes() == before


STATES: Mapping[str, dict[str, Any]] = {
    "state": {"state": "promoted"},
    "verdict": {"verdict": "pass"},
    "both": {"state": "promoted", "verdict": "pass"},
    "digest": {"digest": "0" * 64},
    "artifact": {"artifact": "../elsewhere"},
    "parent": {"parent_digest": "0" * 64},
    "figures": {"tokens": 10**9, "eval_loss": 0.0, "warnings": ["all is well"]},
}


@pytest.mark.parametrize("name", STATES)
def test_what_run_json_says_about_an_artifact_is_not_believed(run: Path, name: str) -> None:
    written = (run / "run.json").read_text()
    truth = json.loads(written)
    record = json.loads(written)
    record["state"] = "done"
    record["stages"][0] |= STATES[name]
    (run / "run.json").write_text(json.dumps(record))
    main("report", str(run))
    text = (run / "report.md").read_text()
    assert "# mine: gate failed" in text
    assert "| sft | sft | gate_failed | stages/sft/artifact |" in text
    assert truth["stages"][0]["digest"][:12] in text
    assert "all is well" not in text
    assert isinstance(again(), GateFailed)
    now = run_json()
    for key in ("state", "verdict", "digest", "artifact", "parent_digest", "tokens", "eval_loss", "warnings"):
        assert now["stages"][0][key] == truth["stages"][0][key]


def test_a_stage_that_was_never_trained_is_not_promoted_by_run_json(run: Path) -> None:
    record = run_json()
    more = {**record["stages"][0], "name": "dpo", "kind": "dpo", "state": "promoted", "verdict": "pass"}
    (run / "run.json").write_text(json.dumps({**record, "stages": [*record["stages"], more]}))
    main("report", str(run))
    assert "| dpo | dpo | pending |" in (run / "report.md").read_text()


def make_folder(path: Path) -> None:
    path.mkdir()


CONTENTS: Mapping[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "blank": lambda path: path.write_text("\n \n"),
    "torn": lambda path: path.write_text('{"state": "pass", "tasks": [{"ta'),
    "list": lambda path: path.write_text("[]"),
    "number": lambda path: path.write_text("7"),
    "null": lambda path: path.write_text("null"),
    "other keys": lambda path: path.write_text('{"hello": "world"}'),
    "nan": lambda path: path.write_text('{"state": NaN, "digest": Infinity, "files": -Infinity}'),
    "huge": lambda path: path.write_text('{"digest": 1e999, "n": ' + "9" * 5000 + "}"),
    "deep": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "deep keys": lambda path: path.write_text('{"digest": ' * 900 + "1" + "}" * 900),
    "not UTF-8": lambda path: path.write_bytes(b'{"state": "\xff\xfe"}'),
    "zeros": lambda path: path.write_bytes(b"\0" * 512),
    "folder": make_folder,
    "pipe": os.mkfifo,
    "dangling link": lambda path: path.symlink_to("nowhere"),
}
NAMES = {
    "run.json": "run.json",
    "verdict.json": "stages/sft/verdict.json",
    "scorecard.jsonl": "stages/sft/scorecard.jsonl",
    "manifest.json": "stages/sft/artifact/manifest.json",
    "lifts.jsonl": "stages/sft/lifts.jsonl",
}


def put(path: Path, content: str) -> None:
    path.unlink()
    CONTENTS[content](path)


@pytest.fixture
def nothing_hangs() -> Iterator[None]:
    """A read of a pipe would never return."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.usefixtures("nothing_hangs")
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_file_in_the_place_of_a_record_is_named(
    run: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run / NAMES[name], content)
    error = again()
    assert error.exit_code == 5
    assert name in str(error)
    code = main("report", str(run))
    said = capsys.readouterr().err
    if name == "lifts.jsonl":  # a report has no need of it
        for action in ("verify", "rebuild"):
            assert main("ledger", action) == 5
            assert "stages/sft" in capsys.readouterr().err
    else:
        assert code == 5
        assert name in said


@pytest.mark.usefixtures("nothing_hangs")
@pytest.mark.parametrize("content", CONTENTS)
def test_a_foreign_manifest_is_named_by_every_command(
    run: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = run / "stages/sft/artifact"
    put(artifact / "manifest.json", content)
    for words in (("merge", str(artifact), "merged"), ("gate", f"adapter={artifact}", "gate=quickstart")):
        assert main(*words) == 5
        assert "manifest.json" in capsys.readouterr().err


def installed(monkeypatch: pytest.MonkeyPatch, name: str, version: str, **members: Any) -> EntryPoint:
    """The entry point of a plugin ``name`` in a distribution of this version."""
    module = types.ModuleType(f"plugin_{name}")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = EntryPoint(name=name, value=module.__name__, group=plugins.GROUP)
    about = SimpleNamespace(metadata={"Name": f"{name}-plugin", "Version": version})
    vars(entry).update(dist=about)
    return entry


@hookimpl
def pass_all(request: GateRequest) -> Verdict:
    return Verdict(state="pass", gated=True, tasks=(), reason="looks good to me")


@hookimpl
def have_no_opinion(request: GateRequest) -> None:
    return None


@hookimpl(wrapper=True)
def overrule(request: GateRequest) -> Generator[None, Verdict, Verdict]:
    return replace((yield), state="pass", reason="overruled")


@hookimpl(wrapper=True)
def watch_scores(request: GateRequest) -> Generator[None, Scorecard, Scorecard]:
    return (yield)


def run_with(entries: Sequence[EntryPoint], scores: Scores) -> str:
    """The state of the stage after a run with these plugins."""
    core = [entry for entry in entry_points(group=plugins.GROUP) if entry.name != "trackers"]
    host = plugins.load([*core, *entries])
    host.manager.unregister(name="scoring.plugin")
    host.manager.register(scores, "scores")
    with contextlib.suppress(GateFailed):
        run_on(host, "stages=[sft]")
    return states()["sft"]


def told(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "stages/sft/verdict.json").read_text()))


CORE = f"posttrain {__version__}"


def test_who_scored_and_who_judged_is_told_everywhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lax = installed(monkeypatch, "lax", "1.2", judge_artifact=overrule, evaluate_artifact=watch_scores)
    assert run_with([lax], Scores()) == "promoted"
    by = {"scored_by": ["scores", "lax (lax-plugin 1.2)"], "judged_by": [CORE, "lax (lax-plugin 1.2)"]}
    assert {key: told(run)[key] for key in by} == by
    row = ledger.lifts(Path("runs"))[-1].lift
    assert (row.scored_by, row.judged_by) == tuple(", ".join(names) for names in by.values())
    text = f"scored by {row.scored_by}; judged by {row.judged_by}"
    assert text in (run / "report.md").read_text()
    assert text in read_page((run / "report.html").read_text()).words
    suite = ElementTree.parse(run / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    found = [(each.get("name"), each.get("value")) for each in suite.iter("property")]
    assert [each for each in found if each[0] != "evidence"] == [(key, name) for key in by for name in by[key]]


def test_a_plugin_without_an_answer_is_not_behind_a_verdict(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_with([installed(monkeypatch, "shy", "1.0", judge_artifact=have_no_opinion)], Scores()) == "gate_failed"
    assert told(run)["judged_by"] == [CORE]


def test_a_plugin_that_is_gone_or_another_version_is_asked_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def versioned(number: str) -> list[EntryPoint]:
        return [installed(monkeypatch, "lax", number, judge_artifact=pass_all)]

    asked = []
    for entries in (versioned("1.0"), versioned("1.0"), versioned("1.1"), [], []):
        scores = Scores()
        asked.append((run_with(entries, scores), told(run)["judged_by"], scores.asked))
    first, second = (["lax (lax-plugin 1.0)"], ["lax (lax-plugin 1.1)"])
    assert asked == [
        ("promoted", first, ["sft"]), ("promoted", first, []), ("promoted", second, ["sft"]),
        ("gate_failed", [CORE], ["sft"]), ("gate_failed", [CORE], []),
    ]  # fmt: skip


def test_a_verdict_of_a_plugin_that_is_not_installed_is_no_start(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lax = installed(monkeypatch, "lax", "1.0", judge_artifact=pass_all)
    assert run_with([lax], Scores()) == "promoted"
    start = ("stages=[dpo]", f"start_from={run}/stages/sft/artifact", "output_root=other")
    with pytest.raises(BadInput, match=r"never judged: lax \(lax-plugin 1.0\), behind its verdict, is not installed"):
        run_on(host_of(Scores(0.9)), *start)


def test_an_edited_verdict_of_a_plugin_is_made_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def fail_all(request: GateRequest) -> Verdict:
        return Verdict(state="fail", gated=True, tasks=(), reason="no")

    strict = [installed(monkeypatch, "strict", "1.0", judge_artifact=fail_all)]
    assert run_with(strict, Scores()) == "gate_failed"
    sign(run / "stages/sft", lambda record: record.update(state="pass"))
    assert run_with(strict, Scores()) == "gate_failed"
    assert told(run)["state"] == "fail"
