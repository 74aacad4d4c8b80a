"""The eval loss: one mean over all trained tokens, without a trace in training, exact when resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from posttrain.artifact import ModelSource
from posttrain.config.compose import compose
from posttrain.config.schema import Method
from posttrain.engine.attention import install
from posttrain.engine.engine import Single
from posttrain.engine.evaluation import Evaluation, Measured
from posttrain.errors import BadInput, Diverged
from posttrain.host.plugins import Host
from posttrain.model.loading import load_model, new_adapter
from posttrain.plan import Step, make_plan
from posttrain.run.display import Display, TrainingProgress
from posttrain.run.job import records_digest
from posttrain.sft.examples import split_eval
from posttrain.sft.stage import run
from posttrain.tokens.chat import Rendered
from posttrain.tokens.packing import PackedRow
from posttrain.tokens.table import TokenTable
from tests.support.fakes import write_project
from tests.support.sft import context, conversations
from tests.support.tiny import (
    Killed,
    Recorder,
    base_source,
    sft_config,
    tiny_llama,
    write_base,
)
from tests.support.training import DROPOUT, EVAL_ROWS, ROWS, evaluation, policy, trained_bytes, training


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return base_source(write_base(tmp_path_factory.mktemp("models") / "base"))


@torch.no_grad()
def reference(model: torch.nn.Module, rows: Sequence[PackedRow]) -> float:
    """The mean over all trained tokens, each document alone through plain code in float64."""
    total, tokens = 0.0, 0
    for row in rows:
        ids_T = torch.from_numpy(row.input_ids.astype(np.int64))
        logits_TV = model(input_ids=ids_T[None]).logits[0]
        labels_T = torch.where(torch.from_numpy(row.mask), ids_T, -100)
        total += float(F.cross_entropy(logits_TV[:-1], labels_T[1:], reduction="sum"))
        tokens += int(row.mask.sum())
    return total / tokens


# --- What is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_length": 60, "per_device_batch_size": 1},
        {"sequence_length": 64, "per_device_batch_size": 3},
        {"sequence_length": 512, "per_device_batch_size": 1},
        {"sequence_length": 64, "loss_chunk": 5},
    ],
)
def test_the_loss_is_that_of_plain_float64_however_the_set_is_cut(settings: dict[str, Any]) -> None:
    expected = reference(tiny_llama().double().eval(), EVAL_ROWS)
    model = tiny_llama()
    install(model)
    metrics = evaluation(**settings).measure(0, Single(model.train(), sft_config()), "float32")
    assert metrics == {"eval_loss": pytest.approx(expected, rel=1e-6)}
    means = [reference(tiny_llama().double().eval(), [row]) for row in EVAL_ROWS]
    assert abs(sum(means) / len(means) - expected) > 1e-3 * expected


def test_refusals_are_measured_apart() -> None:
    model = tiny_llama()
    install(model)
    metrics = evaluation(refusals=2).measure(0, Single(model, sft_config()), "float32")
    plain = tiny_llama().double().eval()
    assert metrics["eval_loss"] == pytest.approx(reference(plain, EVAL_ROWS), rel=1e-6)
    assert metrics["eval_loss_answers"] == pytest.approx(reference(plain, EVAL_ROWS[:-2]), rel=1e-6)
    assert metrics["eval_loss_refusals"] == pytest.approx(reference(plain, EVAL_ROWS[-2:]), rel=1e-6)


def test_dropout_is_off_and_the_model_goes_on_training(base: ModelSource) -> None:
    model = new_adapter(load_model(base, "float32"), replace(DROPOUT, dropout=0.9), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = reference(model.eval(), EVAL_ROWS)
    install(model)
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (evaluation().measure(0, Single(model, sft_config()), "float32") for _ in range(2))
    assert first == second
    assert first["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


# --- In the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, {0, 3, 6}), ({"eval_steps": 4}, {0, 4, 6}), ({"max_steps": 2}, {0, 2})],
)
def test_it_is_measured_first_and_last_and_between(
    base: ModelSource,
    tmp_path: Path,
    settings: dict[str, Any],
    steps: set[int],
) -> None:
    progress = Recorder()
    settings = {"epochs": 2, **settings}
    measured = evaluation(**settings)
    training(policy(base, Method.lora), tmp_path, progress=progress, evaluation=measured, **settings).run()
    assert {step for step, metrics in progress.steps.items() if "eval_loss" in metrics} == steps
    assert set(progress.steps[0]) == {"eval_loss"}
    assert measured.figures()["eval_loss"] == progress.steps[max(steps)]["eval_loss"]
    assert measured.figures()["eval_loss_first"] == progress.steps[0]["eval_loss"]
    assert measured.figures()["eval_trained_tokens"] == sum(int(row.mask.sum()) for row in EVAL_ROWS)


@pytest.mark.parametrize(("method", "dtype"), [(Method.lora, "float32"), (Method.full, "bfloat16")])
def test_what_is_trained_is_the_same_with_and_without_it(
    base: ModelSource,
    tmp_path: Path,
    method: Method,
    dtype: str,
) -> None:
    results = []
    for name, rows in (("without", []), ("with", EVAL_ROWS)):
        model = policy(base, method, dtype)
        settings = {"epochs": 2, "gradient_checkpointing": True, "eval_steps": 1}
        measured = evaluation(rows, **settings)
        training(model, tmp_path / name, evaluation=measured, dtype=dtype, **settings).run()
        results.append(trained_bytes(model))
    assert results[0] == results[1]


def test_killed_anywhere_it_ends_with_the_same_figures(base: ModelSource, tmp_path: Path) -> None:
    settings = {"epochs": 2, "checkpoint_steps": 2, "eval_steps": 2, "lr": 5e-2}
    whole, uninterrupted = evaluation(**settings), Recorder()
    model = policy(base, Method.lora)
    training(model, tmp_path / "whole", progress=uninterrupted, evaluation=whole, **settings).run()
    for step in range(7):
        with pytest.raises(Killed):
            training(
                policy(base, Method.lora), tmp_path / "cut", progress=Recorder(step), evaluation=evaluation(**settings),
                **settings,
            ).run()  # fmt: skip
    again, rest, measured = policy(base, Method.lora), Recorder(), evaluation(**settings)
    training(again, tmp_path / "cut", progress=rest, evaluation=measured, **settings).run()
    assert trained_bytes(again) == trained_bytes(model)
    assert list(rest.steps) == [5, 6]
    assert rest.steps == {step: uninterrupted.steps[step] for step in (5, 6)}
    assert measured.figures() == whole.figures()
    assert measured.warnings() == whole.warnings()


def test_other_eval_records_do_not_resume_from_a_checkpoint(base: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        training(policy(base, Method.lora), tmp_path, progress=Recorder(2), evaluation=evaluation()).run()
    progress = Recorder()
    training(policy(base, Method.lora), tmp_path, progress=progress, evaluation=evaluation(EVAL_ROWS[1:])).run()
    assert progress.started[1] == 0


def test_an_eval_loss_that_is_no_number_stops_the_run(base: ModelSource, tmp_path: Path) -> None:
    model, progress = policy(base, Method.full), Recorder(3)
    measured = evaluation(eval_steps=2)

    def poison(step: int, metrics: object) -> None:
        model.model.norm.register_forward_pre_hook(lambda module, inputs: None if module.training else (inputs[0] / 0,))

    progress.step = poison  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="diverged at step 2: the eval loss is nan"):
        training(model, tmp_path, progress=progress, evaluation=measured).run()


def test_a_line_of_step_0_is_written_once(tmp_path: Path, host: Host) -> None:
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(2):  # killed before the first checkpoint, and started again
        with (tmp_path / "log.txt").open("a") as shown:
            progress = TrainingProgress(Display(Console(file=shown)), "sft", metrics, host)
            progress.start(4, 0)
            progress.step(0, {"eval_loss": 1.5})
            progress.stop()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0]


# --- What it warns of -------------------------------------------------------------------------------------------------


def test_training_on_few_records_for_long_is_called_overfitting(base: ModelSource, tmp_path: Path) -> None:
    settings = {"epochs": 10, "lr": 1e-2}
    measured = evaluation(**settings)
    progress = Recorder()
    training(policy(base, Method.full), tmp_path, ROWS[:2], progress=progress, evaluation=measured, **settings).run()
    losses = {step: metrics["eval_loss"] for step, metrics in progress.steps.items()}
    lowest = min(losses, key=lambda step: losses[step])
    (warning,) = measured.warnings()
    assert f"it was lowest at step {lowest} ({losses[lowest]:.4f}); {losses[10]:.4f} at step 10" in warning


def after(changes: Sequence[float], refusals: int = 0) -> Evaluation:
    """An evaluation whose documents of 10 trained tokens changed by so much per token since its first step."""
    row = PackedRow(np.arange(11, dtype=np.int32), np.array([False] + [True] * 10), (11,))
    result = evaluation([row] * len(changes), refusals)
    start = torch.full((len(changes),), 20.0, dtype=torch.float64)
    result.first = result.best = Measured(0, start)
    result.last = Measured(8, start + 10 * torch.tensor(changes, dtype=torch.float64))
    return result


def test_a_rise_within_the_noise_is_not_a_warning() -> None:
    assert "overfitting" in after([0.3, 0.2, 0.4, 0.3]).warnings()[0]
    assert after([0.9, -0.5, 0.8, -0.4]).warnings() == []
    assert after([0.001] * 50).warnings() == []
    assert after([5.0]).warnings() == []
    assert after([-0.3, -0.2, -0.4]).warnings() == []


def test_the_error_of_a_difference_is_that_of_the_mean_when_documents_are_equally_long() -> None:
    changes = [0.1, 0.4, -0.2, 0.3, 0.05]
    found = after(changes)
    assert found.first is not None
    assert found.last is not None
    difference = found.difference(found.first, found.last)
    assert difference.value == pytest.approx(np.mean(changes))
    assert difference.error == pytest.approx(np.std(changes, ddof=1) / len(changes) ** 0.5)


def test_learning_to_decline_at_the_cost_of_answers_is_a_warning() -> None:
    answers, refusals = [0.05, 0.06, 0.04], [-0.5, -0.4, -0.6]
    (warning,) = after([*answers, *refusals], refusals=3).warnings()
    assert "learns to decline" in warning
    assert after([-0.05, -0.06, -0.04, *refusals], refusals=3).warnings() == []


# --- Which records ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0.01, 0.6), st.integers(0, 3))
def test_equal_documents_stay_on_one_side(texts: list[int], share: float, seed: int) -> None:
    examples = TokenTable.of([Rendered([text, text + 1], [False, True], "") for text in texts]).all()
    distinct = len(set(texts))
    if max(1, round(share * distinct)) == distinct:
        with pytest.raises(BadInput, match="takes all"):
            split_eval(examples, share, seed)
        return
    trained, measured = split_eval(examples, share, seed)
    assert len(measured) == max(1, round(share * distinct))
    chosen = {example.ids[0] for example in measured}
    assert chosen == set(Random(f"eval/{seed}").sample(sorted(set(texts)), len(measured))), "drawn from sorted ids"
    assert len(chosen) == len(measured)
    assert [example.ids[0] for example in trained] == [text for text in texts if text not in chosen]
    assert [list(each) for each in split_eval(examples, share, seed)] == [list(trained), list(measured)]


def test_a_share_is_not_trained(base: ModelSource, tmp_path: Path) -> None:
    stage = context(base, tmp_path, eval_share=0.25, records=conversations(12) * 2)
    run(stage)
    assert (stage.metrics["records"], stage.metrics["eval_documents"]) == (18, 3)
    assert stage.metrics["eval_loss"] == stage.progress.steps[stage.metrics["steps"]]["eval_loss"]


def test_other_records_can_be_given(base: ModelSource, tmp_path: Path) -> None:
    others = conversations(20)[12:]
    stage = replace(context(base, tmp_path, records=conversations(12)), eval_records=others)
    run(stage)
    assert (stage.metrics["records"], stage.metrics["eval_documents"]) == (12, 8)
    assert "trained as well" not in str(stage.metrics["warnings"])


def test_eval_records_that_are_trained_as_well_are_counted(base: ModelSource, tmp_path: Path) -> None:
    stage = replace(context(base, tmp_path, eval_data="a.jsonl", max_steps=1), eval_records=conversations(15)[9:])
    run(stage)
    assert "eval_data: 3 eval records are trained as well" in str(stage.metrics["warnings"])


def sft_step(host: Host, *overrides: str) -> Step:
    return make_plan(compose(host, ["recipe=mine", "+gate@sft.gate=none", "stages=[sft]", *overrides]), host).steps[0]


def test_eval_data_is_read_checked_and_part_of_the_run(host: Host, working_folder: Path) -> None:
    write_project(working_folder)
    Path("other.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    both = sft_step(host, "sft.data=[train.jsonl,other.jsonl]")
    apart = sft_step(host, "sft.eval_data=other.jsonl")
    assert [source.path for source in apart.eval_sources] == ["other.jsonl"]
    assert len({records_digest(step) for step in (both, apart, sft_step(host))}) == 3
    with pytest.raises(BadInput, match=r"sft\.eval_data: nothing\.jsonl: no such file"):
        sft_step(host, "sft.eval_data=nothing.jsonl")
    with pytest.raises(BadInput, match=r"sft\.eval_data: weight of other\.jsonl is 0\.0"):
        sft_step(host, "+sft.eval_data.path=other.jsonl", "+sft.eval_data.weight=0")
    with pytest.raises(BadInput, match=r"sft\.eval_share: .*use one of the two"):
        sft_step(host, "sft.eval_data=other.jsonl", "sft.eval_share=0.1")


@pytest.mark.parametrize(
    ("setting", "value"), [("eval_share", 1.0), ("eval_share", -0.1), ("eval_steps", 0), ("eval_steps", 5)]
)
def test_a_value_out_of_range_is_a_problem_by_name(setting: str, value: float) -> None:
    assert [name for name, _ in sft_config(**{setting: value}).problems()] == [setting]
