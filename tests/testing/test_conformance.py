"""The conformance suite: the product's own stage passes it, and stages that misbehave do not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.gate.spec import GateRequest
from posttrain.testing import FakeEvaluator, StageConformance, write_base
from posttrain.testing.footprint import Footprint
from tests.support.installed import install
from tests.support.tiny import base_source


class TestSFT(StageConformance):
    kind = "sft"
    settings = {
        "method": "lora", "lr": 1e-2, "sequence_length": 32, "gradient_accumulation": 2, "epochs": 2,
        "checkpoint_steps": 1, "lora": {"r": 4, "alpha": 8},
    }  # fmt: skip


# --- The suite notices what it is there for ---------------------------------------------------------------------------

QUICK = {"lr": 1e-3, "max_steps": 5, "batch_size": 3, "checkpoint_steps": 1}
NOISE = "for p in filter(lambda p: p.requires_grad, model.parameters()):\n        p.data += 1e-3 * torch.rand(1)"
WRONGS = {
    # what is wrong: text of the stage, text in its place, the test that has to fail, what it says
    "unseeded": (
        "torch.manual_seed(context.seed)\n    model = context.policy().train()",
        f"torch.seed()\n    model = context.policy().train()\n    {NOISE}",
        "test_the_same_seed_gives_the_same_bytes_and_another_does_not",
        "the same seed gave other bytes",
    ),
    "deaf": (
        "manual_seed(seed)",
        "manual_seed(0)",
        "test_the_same_seed_gives_the_same_bytes_and_another_does_not",
        "another seed gave the same bytes",
    ),
    "forgetful": (
        "position = context.restore(model, optimizer)",
        "position = context.restore(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))",
        "test_killed_after_every_step_it_ends_with_the_same_bytes",
        "the resumed run ended with other bytes",
    ),
    "clean": (
        "context.checkpoint(step, loss, model, optimizer)\n",
        "pass\n",
        "test_sigterm_after_any_step_saves_it_and_costs_nothing",
        "were trained again",
    ),
    "stubborn": (
        "stopped = context.stop_requested()",
        "stopped = False",
        "test_sigterm_after_any_step_saves_it_and_costs_nothing",
        "it trained until step 5",
    ),
    "untidy": (
        "context.save(model)",
        "context.save(model)\n    open('notes.txt', 'w').close()",
        "test_it_writes_nowhere_but_into_its_run",
        "notes.txt",
    ),
    "silent": (
        "context.progress.step(step,",
        "context.progress.step(1,",
        "test_it_trains_and_its_artifact_verifies",
        "steps are reported from 1, each once",
    ),
}


def conformance_of(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> StageConformance:
    """The suite for the stage that ``posttrain new-plugin`` writes, with one thing changed."""
    with pytest.raises(SystemExit):
        cli.main(["new-plugin", name])
    folder = Path(f"posttrain-{name}").absolute()
    package = folder / f"posttrain_{name}"
    files = {str(path.relative_to(folder)): path.read_text() for path in package.rglob("*.*") if path.is_file()}
    first = f"posttrain_{name}/__init__.py"
    stage = files[f"posttrain_{name}/stage.py"]
    assert old in stage
    files[f"posttrain_{name}/stage.py"] = stage.replace(old, new)
    install(folder, monkeypatch, name, {first: files.pop(first), **files})
    return type("Suite", (StageConformance,), {"kind": name, "settings": QUICK})()


@pytest.mark.parametrize("name", WRONGS)
def test_a_stage_that_misbehaves_does_not_pass(
    name: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, test, says = WRONGS[name]
    suite = conformance_of(name, old, new, monkeypatch)
    given = {"tmp_path_factory": tmp_path_factory, "tmp_path": tmp_path, "monkeypatch": monkeypatch}
    method = getattr(suite, test)
    wanted = method.__func__.__code__.co_varnames[1 : method.__func__.__code__.co_argcount]
    with pytest.raises(AssertionError, match=says):
        method(**{key: given[key] for key in wanted})


def test_a_stage_that_imports_torch_to_be_listed_does_not_pass(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = conformance_of("heavy", "import torch\n", "import torch\n", monkeypatch)
    plugin = Path("posttrain-heavy/posttrain_heavy/__init__.py")
    plugin.write_text(plugin.read_text().replace("from pathlib", "import torch\nfrom pathlib"))
    with pytest.raises(AssertionError, match="planning imported"):
        suite.test_planning_imports_no_torch(tmp_path_factory)


def test_a_stage_that_trains_on_what_it_must_reject_does_not_pass(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = conformance_of("greedy", "import torch\n", "import torch\n", monkeypatch)
    suite.test_bad_records_are_rejected_before_training(tmp_path_factory, tmp_path / "before")
    monkeypatch.setattr(type(suite), "rejected", [[{"prompt": "sound", "completion": "enough"}]])
    with pytest.raises(AssertionError, match=r"file 1 of rejected: .* was trained on"):
        suite.test_bad_records_are_rejected_before_training(tmp_path_factory, tmp_path / "after")


# --- The other tools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [({}, "pass"), ({"candidate": 0.1}, "fail"), ({"candidate": 0.2}, "undecided")],
)
def test_the_fake_evaluator_is_judged_by_the_real_gate(tmp_path: Path, scores: dict[str, float], expected: str) -> None:
    source = base_source(write_base(tmp_path / "base"))
    task = GateTask(role=Role.lift, metric="acc")
    request = GateRequest(
        stage="mine", gate=GateConfig(tasks={"some": {}}), tasks={"some": task},
        systems={"base": source, "candidate": source}, dtype="float32", cache=tmp_path, scorecard=tmp_path / "s",
    )  # fmt: skip
    evaluator = FakeEvaluator(scores, documents=200)
    verdict = evaluator.judge_artifact(request, evaluator.evaluate_artifact(request))
    assert verdict.state == expected
    assert evaluator.judged == ["mine"]


def test_a_footprint_sees_what_is_written_elsewhere_and_nothing_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    with Footprint(allowed=[inside]) as footprint:
        (inside / "a").write_text("a")
        (tmp_path / "inner").mkdir()
        outside.write_text("b")
        outside.read_text()
        outside.rename(inside / "b")
        shutil.copy(inside / "a", tmp_path / "c")
        (tmp_path / "c").unlink()
    outside.write_text("after")
    names = {str(Path(path).relative_to(tmp_path)) for path in footprint.written}
    assert names == {"inner", "out", "c"}


def test_the_tools_import_no_pytest() -> None:
    code = "import sys, posttrain.testing; print(*{'pytest', 'torch', 'transformers', 'hydra'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
