from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from posttrain_preference.stage import run
from preference_support.contexts import STAGES, MakeContext, content, progress
from preference_support.loops import before_steps, loss_of

from posttrain import Interrupted
from posttrain.engine.loop import Training


class Killed(BaseException):
    """The process died here."""


@pytest.mark.parametrize(("name", "kind"), [*((name, "lora") for name in STAGES), ("dpo", "qlora"), ("orpo", "qlora")])
def test_killed_at_every_step_a_stage_ends_with_the_same_bytes(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    settings: dict[str, Any] = {"kind": kind, "stage": name, "records": 4, "epochs": 2, "checkpoint_steps": 1}
    settings |= {"dtype": "bfloat16"} if kind == "qlora" else {}
    settings |= {"per_device_batch_size": 4, "gradient_accumulation": 1} if name == "kto" else {}
    whole = make_context(folder="whole", **settings)
    run(whole)
    total = progress(whole).started[0]
    seen: dict[int, Any] = {}
    for died in range(1, total + 1):
        killed = make_context(folder="killed", **settings)
        monkeypatch.setattr(killed.progress, "step", dying_at(died, killed.progress.step))
        with pytest.raises(Killed):
            run(killed)
        assert progress(killed).started == (total, max(died - 2, 0))
        seen |= progress(killed).steps
    resumed = make_context(folder="killed", **settings)
    run(resumed)
    assert total >= 2
    assert content(resumed.output) == content(whole.output)
    assert seen | progress(resumed).steps == progress(whole).steps
    assert resumed.metrics == whole.metrics


def dying_at(last: int, report: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
    def step(step: int, metrics: Any) -> None:
        if step == last:
            raise Killed
        report(step, metrics)

    return step


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_stopped_stage_goes_on_to_the_same_bytes(make_context: MakeContext, kind: str) -> None:
    whole = make_context(kind, folder="whole")
    run(whole)
    stopped = make_context(kind, folder="stopped", stop_requested=lambda: 3 in progress(stopped).steps)
    with pytest.raises(Interrupted, match="after step 3"):
        run(stopped)
    assert not list(stopped.output.iterdir())
    (checkpoint,) = stopped.checkpoints.glob("step-*")
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}

    resumed = make_context(kind, folder="stopped")
    run(resumed)
    assert [part for part in progress(whole).parts if part[2] == "row"] == [(2, 4, "row"), (4, 4, "row")] * 6
    assert progress(resumed).started == (6, 3)
    assert list(progress(resumed).steps) == [4, 5, 6]
    assert content(resumed.output) == content(whole.output)
    assert resumed.metrics == whole.metrics


def test_a_killed_stage_goes_on_from_its_newest_checkpoint(
    make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_context(folder="whole", epochs=3)
    run(whole)
    killed = make_context(folder="killed", epochs=3, checkpoint_steps=2)
    report = killed.progress.step

    def die(step: int, metrics: Any) -> None:
        if step == 6:
            raise KeyboardInterrupt
        report(step, metrics)

    monkeypatch.setattr(killed.progress, "step", die)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    (killed.checkpoints / ".draft").mkdir()
    (killed.checkpoints / ".draft" / "state.safetensors").write_bytes(b"half")
    assert sorted(path.name for path in killed.checkpoints.glob("step-*")) == ["step-00000002", "step-00000004"]

    resumed = make_context(folder="killed", epochs=3, checkpoint_steps=2)
    run(resumed)
    assert progress(resumed).started == (9, 4)
    assert content(resumed.output) == content(whole.output)
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(make_context: MakeContext, name: str) -> None:
    context = make_context(folder="run", max_steps=2, stop_requested=lambda: 1 in progress(context).steps)
    with pytest.raises(Interrupted):
        run(context)
    path = context.checkpoints / "step-00000001" / name
    path.write_bytes(path.read_bytes()[:-8])
    again = make_context(folder="run", max_steps=2)
    run(again)
    assert progress(again).started == (2, 0)
    assert any("checkpoint step-00000001 is not used: " in note for note in progress(again).notes)


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_the_eval_loss_is_measured_and_resumed(make_context: MakeContext, name: str) -> None:
    settings: dict[str, Any] = {"stage": name, "eval_share": 0.3, "eval_steps": 2, "checkpoint_steps": 1}
    whole = make_context(folder="whole", **settings)
    run(whole)
    measured = {step: figures["eval_loss"] for step, figures in progress(whole).steps.items() if "eval_loss" in figures}
    assert list(measured)[:3] == [0, 2, 4]
    assert whole.metrics["eval_loss_first"] == measured[0]
    assert whole.metrics["eval_documents"] == (8 if name == "kto" else 4)
    if name == "dpo":
        assert measured[0] == pytest.approx(math.log(2), abs=1e-6)
    assert min(measured.values()) < measured[0]
    stopped = make_context(folder="stopped", stop_requested=lambda: 1 in progress(stopped).steps, **settings)
    with pytest.raises(Interrupted):
        run(stopped)
    resumed = make_context(folder="stopped", **settings)
    run(resumed)
    assert content(resumed.output) == content(whole.output)
    assert resumed.metrics == whole.metrics


def test_the_eval_loss_is_that_of_a_step_with_all_of_its_rows(make_context: MakeContext) -> None:
    """A likelihood is a mean over tokens: batches of one size or another give the same."""
    losses = []
    for size in (1, 3, 4):
        context = make_context(stage="orpo", eval_share=0.4, per_device_batch_size=size, gradient_accumulation=1)
        seen: list[float] = []

        def measure(training: Training, engine: Any, seen: list[float] = seen) -> None:
            seen.append(training.evaluation.measure(0, engine, "float32")["eval_loss"])
            with torch.no_grad():
                seen.append(loss_of(training, training.evaluation.rows).item())

        before_steps(context, measure)
        losses += seen
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)
