"""The examples of docs/hooks.md, each loaded as a plugin and called by a run without torch."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

import posttrain
from posttrain import BadInput, GateUndecided, Question, hookspecs
from posttrain.config.compose import compose
from posttrain.config.schema import Source
from posttrain.context import StageContext
from posttrain.data.mixing import read_sources
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard, Verdict
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins, readers
from posttrain.host.plugins import Host
from posttrain.plan import make_plan
from tests.support.fakes import GATES, TASK, Script, only_run, run_on, scripted_host, write_project

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples" / "hooks"
HOOKS = sorted(name for name, item in vars(hookspecs).items() if hasattr(item, "posttrain_spec"))
ANNEAL = ("+stage@anneal=anneal", "anneal.data=train.jsonl", "+gate@anneal.gate=careful", "stages=[sft,anneal]")
COURTESY = "+sft.gate.tasks.courtesy={role: lift, metric: acc}"
LONG = "AN ANSWER THAT IS LONG ENOUGH"


class TwelveSteps(Script):
    """Trains for twelve steps; scores two documents, and judges ``anneal`` on too few."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[str] = []
        self.during_training = self.train

    def train(self, context: StageContext) -> None:
        self.answers += [record.messages[-1]["content"] for record in context.records]
        for step in range(2, 13):
            context.progress.step(step, {"loss": 1 / step, "tokens": 10.0})

    @hookimpl
    def evaluate_artifact(self, request: GateRequest) -> Scorecard:
        row = DocumentScore(
            system="base", digest="d", task="some", filter="none", doc_id=0, document_hash="h", request_hash="r",
            target_hash="t", metrics={"acc": 1.0}, response="", target="",
        )  # fmt: skip
        return Scorecard(rows=(row, replace(row, doc_id=1), replace(row, system="candidate")), higher_is_better={})

    @hookimpl
    def judge_artifact(self, request: GateRequest) -> Verdict:
        verdict = super().judge_artifact(request)
        return replace(verdict, tasks=(replace(verdict.tasks[0], n=100 if request.stage == "sft" else 12),))


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """The examples, found as installed plugins are."""
    entries = [EntryPoint(name=name, value=name, group="posttrain") for name in HOOKS]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(plugins, "entry_points", lambda group: [*entry_points(group=group), *entries])
        yield
    for name in HOOKS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": LONG}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    courtesy = (EXAMPLES / "register_eval_tasks" / "courtesy.yaml").read_bytes()
    (folder / "reviewed.txt").write_text("\n".join(sha256(each).hexdigest() for each in (TASK.encode(), courtesy)))
    return folder


class Ran:
    """The one run of all examples, in the working folder."""

    def __init__(self) -> None:
        self.script = TwelveSteps()
        self.host = scripted_host(self.script)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(GateUndecided) as ended:
            run_on(self.host, *ANNEAL, COURTESY)
        self.printed, self.error = printed.getvalue(), str(ended.value)
        self.folder = only_run().resolve()
        self.log = Path("log.txt").read_text()

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name


@pytest.fixture(autouse=True)
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


@pytest.fixture(scope="module")
def ran(project: Path) -> Iterator[Ran]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        yield Ran()


def problems_of(host: Host, *words: str) -> str:
    with pytest.raises(BadInput) as rejected:
        make_plan(compose(host, ["recipe=mine", *GATES, *words]), host)
    return str(rejected.value)


def test_every_hook_has_an_example_that_implements_it(ran: Ran) -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == HOOKS
    for name in HOOKS:
        assert ran.host.plugins[name].state == "loaded", ran.host.plugins[name].reason
        callers = ran.host.manager.get_hookcallers(ran.host.manager.get_plugin(name)) or []
        assert name in [caller.name for caller in callers]


@pytest.mark.parametrize("name", HOOKS)
def test_an_example_takes_public_names_alone(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    read = [
        (node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    taken = [name for module, name in read if module == "posttrain"]
    assert "hookimpl" in taken
    assert set(taken) <= set(posttrain.__all__)
    assert not [module for module, _ in read if module and module.startswith("posttrain.")]


def test_register_stages(ran: Ran) -> None:
    assert ran.script.trained == ["sft", "anneal"]
    called: list[object] = []
    module, _, function = ran.host.stages["anneal"].run.partition(":")
    getattr(importlib.import_module(module), function)(SimpleNamespace(records=["a"], finetune=called.append))
    assert called == [["a"]]


def test_register_settings(ran: Ran) -> None:
    found = problems_of(ran.host, *ANNEAL, "budget.stages=1")
    assert "stages: 2 stages, 1 allowed" in found


def test_register_rewards(ran: Ran) -> None:
    reward = ran.host.rewards["one_word"]
    question = Question(prompt=({"role": "user", "content": "How many?"},), answers=("six",), where="q.jsonl:1")
    scored = [
        reward.score(question, *answer) for answer in (("six", True), ("seven", True), ("six", False), ("a b", True))
    ]
    assert scored == [1.0, 0.5, 0.0, 0.0]


def test_register_config(ran: Ran) -> None:
    plan = make_plan(compose(ran.host, ["recipe=mine", *GATES, *ANNEAL]), ran.host)
    gate = plan.steps[1].gate
    assert gate.confidence == 0.99
    assert set(gate.tasks) == {"ifeval", "mmlu"}


def test_register_eval_tasks(ran: Ran) -> None:
    plan = make_plan(compose(ran.host, ["recipe=mine", *GATES, COURTESY]), ran.host)
    assert plan.steps[0].tasks["courtesy"].task == str(EXAMPLES / "register_eval_tasks" / "courtesy.yaml")


def test_check_plan(ran: Ran) -> None:
    name = "model.path=google/gemma-2-2b"
    assert "model.dtype: google/gemma-2-2b diverges in bfloat16" in problems_of(ran.host, name, "model.dtype=bfloat16")


def test_run_started(ran: Ran) -> None:
    lines = (ran.folder / "loss.csv").read_text().splitlines()
    assert len(lines) == 2 * 12
    assert lines[:2] == ["sft,1,1.0", "sft,2,0.5"]


def test_check_gate(ran: Ran) -> None:
    step = make_plan(compose(ran.host, ["recipe=mine", *GATES]), ran.host).steps[0]
    assert [problem for answer in ran.host.hook.check_gate(step=step) for problem in answer] == []
    Path("reviewed.txt").write_text("")
    with pytest.raises(BadInput, match=r"sft.gate.tasks.some: some.yaml is not reviewed"):
        run_on(scripted_host(Script()), "seed=1")


def test_register_readers(ran: Ran) -> None:
    readers.use(ran.host.readers)
    Path("chats.qa").write_text("Q: Which way?\nA: North.\n\nperhaps\n")
    source = Source(path="chats.qa", max_bad_share=0.5)
    found = read_sources([source], "conversations", seed=0)
    assert [[turn["content"] for turn in record.messages] for record in found] == [["Which way?", "North."]]
    assert [(bad.where, bad.what) for bad in found.bad[0].rows] == [
        ("chats.qa:4", "is neither a question nor an answer to one")
    ]


def test_register_filters(ran: Ran) -> None:
    summary = json.loads((ran.stage("sft") / "artifact" / "manifest.json").read_text())["metrics"]["prepared"]
    assert (summary["kept"], summary["found"]) == (1, {"shouting": 1})
    assert "sft.prepare.rules.shouting: 'quiet' is no action" in problems_of(
        ran.host, "sft.prepare.rules.shouting=quiet"
    )


def test_load_records(ran: Ran) -> None:
    assert ran.script.answers == [LONG, LONG]


def test_run_stage(ran: Ran) -> None:
    assert re.search(r"sft trained for \d+\.\d s", ran.log)
    assert re.search(r"anneal trained for \d+\.\d s", ran.log)


def test_step_logged(ran: Ran) -> None:
    lines = [line for line in ran.printed.splitlines() if "step" in line]
    assert lines == ["sft: step 10, loss 0.100", "anneal: step 10, loss 0.100"]


def test_evaluate_artifact(ran: Ran) -> None:
    assert "2 documents scored for 2 systems" in ran.log
    assert "2 documents scored for 3 systems" in ran.log


def test_judge_artifact(ran: Ran) -> None:
    assert ran.error == "anneal: 12 documents are too few for a pass: 50 needed"


def test_stage_finished(ran: Ran) -> None:
    assert (ran.stage("sft") / "card.md").read_text() == "# sft: pass\n\nMade on base.\n\nsft is a pass\n"
    assert (ran.stage("anneal") / "card.md").read_text().startswith("# anneal: undecided\n")


def test_run_finished(ran: Ran) -> None:
    (line,) = [line for line in Path("runs/runs.log").read_text().splitlines() if ran.folder.name in line]
    assert line.endswith(f"{ran.folder.name} undecided")
