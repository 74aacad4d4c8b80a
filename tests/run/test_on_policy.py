"""Records that a stage's parent makes: through the real pipeline, kept by content, and never a gate's own questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from signal import SIGTERM, raise_signal
from sys import modules
from typing import Any

import pyarrow.parquet as pq
import pytest

from posttrain.cli import dispatch
from posttrain.config.preparation import Action, PrepareConfig
from posttrain.errors import BadInput, Interrupted
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.prepare.contamination import GateDocument
from posttrain.prepare.plugin import QualityRule
from posttrain.rewards.reward import Reward
from posttrain.run import on_policy
from posttrain.run.job import records_digest, step_identity
from posttrain.run.prepared import Preparer
from posttrain.sampling import answers, keeping
from posttrain.sampling.answers import Written
from posttrain.testing import Project
from tests.support.asking import QUESTIONS, asking_project, asking_source

SETTINGS = {"k": 24, "temperature": 3.0, "max_tokens": 40, "reward": "regex"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return asking_project(tmp_path_factory.mktemp("project"))


def source(project: Project, **changed: Any) -> str:
    return asking_source(project, **{**SETTINGS, **changed})


def manifest(run: Path) -> Mapping[str, Any]:
    return dict(json.loads((run / "stages" / "dpo" / "artifact" / "manifest.json").read_text()))


def test_a_stage_trains_on_its_parents_answers_and_a_second_run_asks_nothing_again(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    inner = answers.sample
    monkeypatch.setattr(answers, "BLOCK", 48)
    monkeypatch.setattr(answers, "sample", lambda *given: asked.append(len(given[1])) or inner(*given))
    first = manifest(project.run(tmp_path, source(project)).path)
    (figures,) = first["metrics"]["on_policy"]
    assert asked == [2, 2]
    assert (figures["questions"], figures["answers"]) == (4, 96)
    assert 0 < figures["never_ended"] < 96
    assert 0 < figures["reward"] < 1
    assert figures["records"] > 0
    assert figures["parent"] == first["parent_digest"]

    other = manifest(project.run(tmp_path, source(project), "dpo.beta=0.2").path)
    assert asked == [2, 2]
    assert other["metrics"]["on_policy"] == first["metrics"]["on_policy"]


def test_every_setting_names_the_result(project: Project) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"k": 25}, {"temperature": 2.9}, {"max_tokens": 41}, {"reward": "{regex: 2}"}, {"seed": 1},
    ]  # fmt: skip
    plans = [project.plan(plugins.load(), source(project, **changed)) for changed in changes]
    assert len({records_digest(plan.steps[0]) for plan in plans}) == len(changes)


def test_an_interrupted_sampling_goes_on_at_its_next_block(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    inner = answers.sample

    def interrupted(*given: Any) -> Any:
        asked.append(len(given[1]))
        if len(asked) == 2:
            raise Interrupted("stopped")
        return inner(*given)

    monkeypatch.setattr(answers, "BLOCK", 24)
    monkeypatch.setattr(answers, "sample", interrupted)
    with pytest.raises(Interrupted):
        project.run(tmp_path, source(project))
    (kept,) = tmp_path.glob("cache/answers/*/*.json")
    kept.write_text(kept.read_text().replace('"ended": true', '"ended": false', 1))
    project.run(tmp_path, source(project))
    assert asked == [1, 1, 1, 1, 1, 1], "the second block, the two after it, and the first, which was damaged"


class Raised:
    """A plugin with a reward in another version."""

    def __init__(self, version: int) -> None:
        self.version = version

    @hookimpl
    def register_rewards(self) -> list[Reward]:
        return [Reward(name="mine", summary="", version=self.version, score=lambda asked, text, ended: len(text))]


def test_the_version_of_a_reward_names_the_result(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for version in (1, 2):
        monkeypatch.setitem(modules, "reward_of_mine", Raised(version))  # type: ignore[arg-type]
        entry = EntryPoint(name="mine", value="reward_of_mine", group="posttrain")
        host = plugins.load([*entry_points(group="posttrain"), entry])
        plan = project.plan(host, source(project, reward="mine"))
        found.add(json.dumps(step_identity(plan.steps[0], plan), default=str))
    assert len(found) == 2


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"reward": "exakt"}, "no reward is called 'exakt'"),
        ({"keep": "best"}, "keep=best makes records of conversations; the stage trains preferences"),
        ({"k": 1}, "must be at least 2 for pairs"),
        ({"temperature": 0}, "temperature: must be a finite number above 0"),
        ({"keep": "all"}, "all"),
        ({"questions": "absent.jsonl"}, "no such file"),
        ({"reward": "numeric"}, "not one to look for by numeric"),
    ],
)
def test_unusable_settings_are_rejected_before_anything_is_trained(
    project: Project, tmp_path: Path, changed: dict[str, Any], what: str
) -> None:
    with pytest.raises(BadInput, match=what):
        project.run(tmp_path, source(project, **changed))
    assert not list(tmp_path.glob("*/stages/*/artifact"))


def test_questions_of_a_gate_are_rejected(project: Project, tmp_path: Path) -> None:
    project.write_records([{"question": "A  ELM", "answer": "x"}], "scored.jsonl")
    task = f"{{role: lift, metric: right, task: own_questions, data: '{project.folder / 'scored.jsonl'}'}}"
    with pytest.raises(
        BadInput, match=r"questions.jsonl:3: the gate of dpo asks the same in mine \(.*scored.jsonl:1\)"
    ):
        project.run(tmp_path, source(project), "dpo.gate.enabled=true", f"+dpo.gate.tasks.mine={task}")


def test_no_record_at_all_is_rejected_with_the_figures(project: Project, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no answer of sft can be kept as pairs: 8 answers to 4 questions"):
        project.run(tmp_path, source(project, k=2, max_tokens=1))


def test_sample_writes_the_same_records_with_their_provenance(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"{key}={value}" for key, value in SETTINGS.items()]
    output = tmp_path / "pairs.jsonl"
    asked = str(project.folder / "questions.jsonl")
    assert dispatch(["sample", str(project.folder / "sft"), asked, str(output), *words]) == 0
    assert "was never judged" in capsys.readouterr().out
    pairs = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    provenance = json.loads((tmp_path / "pairs.jsonl.provenance").read_text())
    assert provenance["artifact"] == json.loads((project.folder / "sft" / "manifest.json").read_text())["digest"]
    assert provenance["rewards"] == [provenance["rewards"][0]]
    assert provenance["figures"]["records"] == len(pairs) > 0
    trained = manifest(project.run(tmp_path / "runs", f"dpo.data='{output}'").path)
    sampled = manifest(project.run(tmp_path / "runs", source(project)).path)
    weights = "adapter_model.safetensors"
    assert trained["files"][weights] == sampled["files"][weights], (
        "records from the file train as those of the stage do"
    )
    with pytest.raises(BadInput, match="exists already"):
        dispatch(["sample", str(project.folder / "sft"), asked, str(output)])


def test_sample_writes_no_file_without_a_record(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(project.folder / "sft"), str(project.folder / "questions.jsonl"), "new/pairs.jsonl"]
    with pytest.raises(BadInput, match=r"no answer of .* can be kept as pairs; nothing is written"):
        dispatch(["sample", *words, "k=2", "max_tokens=1"])
    assert "8 answers to 4 questions, mean reward 0.000, 8 never ended" in capsys.readouterr().out
    assert not Path("new").exists()


def test_sample_does_not_replace_a_file_that_another_command_wrote_meanwhile(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inner = keeping.keep

    def late(*given: Any) -> Any:
        Path("pairs.jsonl").write_text("its own\n")
        return inner(*given)

    monkeypatch.setattr(keeping, "keep", late)
    words = [str(project.folder / "sft"), str(project.folder / "questions.jsonl"), "pairs.jsonl"]
    with pytest.raises(BadInput, match="exists already"):
        dispatch(["sample", *words, *[f"{key}={value}" for key, value in SETTINGS.items()]])
    assert Path("pairs.jsonl").read_text() == "its own\n"
    assert not Path("pairs.jsonl.provenance").exists()


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every question a right and a wrong answer, without a model."""
    both = [Written(text=text, ended=True, tokens=3, log_prob=-1.0) for text in ("elm", "no")]
    monkeypatch.setattr(on_policy, "ask", lambda questions, asking: [both for _ in questions])


@pytest.mark.usefixtures("answered")
def test_sampled_rows_are_prepared_with_those_of_files(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four questions one is a copy of another, one of a row in a file, and one holds what a gate asks."""
    asked = "which colour has the first flag of the harbour that you saw"
    monkeypatch.setattr(Preparer, "_documents", lambda self: [GateDocument("mine", 0, f"{asked} today", "")])
    texts = ["a red", "A  red", "a blue", f"{asked} at noon"]
    project.write_records([{**QUESTIONS[0], "question": each} for each in texts], "alike.jsonl")
    project.write_records([{"prompt": "a blue", "chosen": "elm", "rejected": "no"}], "own.jsonl")
    questions, own = str(project.folder / "alike.jsonl"), str(project.folder / "own.jsonl")
    data = source(project, questions=questions).replace("dpo.data=", f"dpo.data=[{{path: {own}, weight: 2}}, ") + "]"
    metrics = manifest(project.run(tmp_path, data).path)["metrics"]
    rows = metrics["prepared"]
    assert (rows["read"], rows["kept"], rows["dropped"]) == (5, 2, {"contamination": 1, "exact": 2})
    assert [(each["source"], each["read"], each["kept"]) for each in rows["sources"]] == [
        (own, 1, 1),
        (questions, 4, 1),
    ]
    assert metrics["pairs"] == 3, "the weight is that of the file"
    ledgers = [pq.read_table(path).to_pylist() for path in tmp_path.glob("cache/data/*/ledger.parquet")]
    assert [row["path"] for row in max(ledgers, key=len)] == [own, *[questions] * 4]

    with pytest.raises(BadInput, match=r"dpo.prepare: 2 findings stop the run \(exact\)"):
        project.run(tmp_path, data, "dpo.prepare.exact=stop")


@pytest.mark.usefixtures("answered")
def test_a_signal_while_answers_are_scored_stops_at_once(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on: list[int] = []

    def scored(*given: Any) -> Any:
        raise_signal(SIGTERM)
        went_on.append(1)

    monkeypatch.setattr(on_policy, "score", scored)
    with pytest.raises(Interrupted):
        project.run(tmp_path, source(project))
    assert not went_on


def test_what_prepares_sampled_rows_names_the_result(project: Project, tmp_path: Path) -> None:
    """The rows are not made yet when the result is looked for: a filter, a rule or a gate has its part in its name."""
    host = plugins.load()
    plan = project.plan(host, source(project))
    step = plan.steps[0]
    digests = {
        Preparer(plan=plan, host=host, step=each, data_digest="", note=print).conditions()
        for each in (step, replace(step, config=replace(step.config, prepare=PrepareConfig(exact=Action.count))))
    }
    host.filters["mine"] = ("prepare", QualityRule("mine"))
    digests.add(Preparer(plan=plan, host=host, step=step, data_digest="", note=print).conditions())
    assert len(digests) == 3
