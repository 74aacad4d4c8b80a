"""The training loop: what it computes, that it repeats itself byte for byte, and how it stops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.artifact import ModelSource
from posttrain.config.schema import GateConfig, LoraSettings, Method
from posttrain.engine.batches import RowOrder
from posttrain.engine.optimizer import make_optimizer
from posttrain.engine.schedule import Schedule
from posttrain.errors import Diverged, Interrupted
from posttrain.model.loading import load_model, new_adapter
from posttrain.tokens.packing import PackedRow
from tests.support.tiny import (
    Killed,
    Recorder,
    base_source,
    documents_of,
    packed_rows,
    sft_config,
    tiny_llama,
    write_base,
)
from tests.support.training import DROPOUT, ROWS, policy, trained_bytes, training

KINDS = [(Method.lora, "bfloat16"), (Method.lora, "float32"), (Method.full, "bfloat16")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return base_source(write_base(tmp_path_factory.mktemp("models") / "base"))


# --- Settings, schedule, order ----------------------------------------------------------------------------------------


def test_the_defaults_have_no_problems() -> None:
    assert list(sft_config().problems()) == []
    assert list(sft_config(lr=0.0, adam_beta1=0.0).problems()) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", -1e-4),
        ("lr", math.nan),
        ("lr", math.inf),
        ("weight_decay", -0.1),
        ("epochs", 0),
        ("max_steps", 0),
        ("sequence_length", 1),
        ("per_device_batch_size", 0),
        ("gradient_accumulation", 0),
        ("checkpoint_steps", 0),
        ("checkpoint_minutes", 0.0),
        ("loss_chunk", 0),
        ("warmup_ratio", 1.1),
        ("min_lr_ratio", math.nan),
        ("adam_beta2", 1.0),
        ("adam_eps", 0.0),
        ("max_grad_norm", 0.0),
    ],
)
def test_a_value_out_of_range_is_a_problem_by_name(setting: str, value: float) -> None:
    assert [name for name, _ in sft_config(**{setting: value}).problems()] == [setting]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("r", 0),
        ("alpha", 0),
        ("dropout", 1.0),
        ("target_modules", "q_proj"),
        ("target_modules", []),
        ("target_modules", ["q_proj", "lm_head"]),
    ],
)
def test_an_impossible_adapter_is_a_problem_by_name(setting: str, value: object) -> None:
    config = sft_config(lora=replace(LoraSettings(), **{setting: value}))
    assert [name for name, _ in config.problems()] == [f"lora.{setting}"]


def test_the_rate_rises_to_the_peak_and_falls_to_the_floor() -> None:
    schedule = Schedule.from_config(sft_config(lr=2.0, warmup_ratio=0.1, min_lr_ratio=0.25), total=100)
    rates = [schedule.rate(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (1 + 0.25) / 2)
    assert all(first >= second for first, second in pairwise(rates[9:]))
    assert 0.5 < rates[-1] < 0.51


@given(total=st.integers(1, 300), ratio=st.floats(0, 1), floor=st.floats(0, 1))
def test_every_rate_is_positive_and_at_most_the_peak(total: int, ratio: float, floor: float) -> None:
    schedule = Schedule.from_config(sft_config(lr=3.0, warmup_ratio=ratio, min_lr_ratio=floor), total)
    assert all(0 < schedule.rate(step) <= 3.0 for step in range(1, total + 1))


def test_only_matrices_decay() -> None:
    model = tiny_llama()
    groups = make_optimizer(model, sft_config(weight_decay=0.1)).param_groups
    assert {(p.ndim, group["weight_decay"]) for group in groups for p in group["params"]} == {(2, 0.1), (1, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@given(rows=st.integers(1, 40), accumulation=st.integers(1, 7), epochs=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_epoch_sees_every_row_once(rows: int, accumulation: int, epochs: int, seed: int) -> None:
    config = sft_config(gradient_accumulation=accumulation, epochs=epochs)
    order = RowOrder.from_config(config, rows, seed)
    steps = list(order)
    assert len(steps) == epochs * math.ceil(rows / accumulation)
    for epoch in range(epochs):
        part = steps[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        assert sorted(index for step in part for index in step) == list(range(rows))
        assert [len(step) for step in part[:-1]] == [accumulation] * (len(part) - 1)


def test_epochs_and_seeds_shuffle_differently_and_max_steps_stops_early() -> None:
    order = RowOrder.from_config(sft_config(gradient_accumulation=32), 32, seed=0)
    other = RowOrder.from_config(sft_config(gradient_accumulation=32), 32, seed=1)
    assert order.of_step(1) != order.of_step(2)
    assert order.of_step(1) != other.of_step(1)
    assert len(list(RowOrder.from_config(sft_config(max_steps=3), 32, seed=0))) == 3


# --- What a step computes ---------------------------------------------------------------------------------------------


def reported(base: ModelSource, folder: Path, rows: Sequence[PackedRow], **settings: Any) -> Recorder:
    progress = Recorder()
    training(policy(base, Method.full), folder, rows, progress=progress, **settings).run()
    return progress


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_batch_size": 5, "gradient_accumulation": 1},
        {"per_device_batch_size": 2, "gradient_accumulation": 3},
        {"loss_chunk": 5},
        {"gradient_checkpointing": True},
    ],
)
def test_cutting_a_step_differently_changes_nothing(
    base: ModelSource, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = {"gradient_accumulation": 5, "epochs": 3}
    expected = reported(base, tmp_path / "a", ROWS, **whole)
    actual = reported(base, tmp_path / "b", ROWS, **(whole | settings))
    for step, metrics in expected.steps.items():
        assert actual.steps[step] == pytest.approx(metrics, rel=1e-5)
    assert actual.steps[1]["grad_norm"] == pytest.approx(expected.steps[1]["grad_norm"], rel=1e-6)


def test_packing_changes_nothing_but_the_order(base: ModelSource, tmp_path: Path) -> None:
    alone = [document for row in ROWS for document in documents_of(row)]
    packed = reported(base, tmp_path / "a", ROWS, gradient_accumulation=len(ROWS), max_steps=1)
    single = reported(base, tmp_path / "b", alone, gradient_accumulation=len(alone), max_steps=1)
    assert single.steps[1] == pytest.approx(packed.steps[1], rel=1e-6)


def test_the_last_step_of_an_epoch_is_a_mean_over_its_own_tokens(base: ModelSource, tmp_path: Path) -> None:
    progress = reported(base, tmp_path, ROWS, gradient_accumulation=4, epochs=1, lr=0.0)
    order = RowOrder.from_config(sft_config(gradient_accumulation=4, epochs=1), len(ROWS), seed=0)
    for step in (1, 2):
        rows = [ROWS[index] for index in order.of_step(step)]
        alone = reported(base, tmp_path / str(step), rows, gradient_accumulation=8, epochs=1, lr=0.0)
        assert progress.steps[step]["loss"] == pytest.approx(alone.steps[1]["loss"], rel=1e-6)
        assert progress.steps[step]["trained_tokens"] == sum(int(row.mask.sum()) for row in rows)
        assert progress.steps[step]["tokens"] == sum(len(row.input_ids) for row in rows)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss(base: ModelSource, tmp_path: Path, method: Method, dtype: str) -> None:
    progress = Recorder()
    model = policy(base, method, dtype)
    training(model, tmp_path, progress=progress, dtype=dtype, epochs=8, gradient_accumulation=5, lr=2e-2).run()
    assert progress.steps[8]["loss"] < 0.7 * progress.steps[1]["loss"]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def first_update(base: ModelSource, folder: Path, **settings: Any) -> tuple[float, float]:
    """Norm of the first change of the weights as a multiple of the peak rate, and of the gradient."""
    model, progress = policy(base, Method.full), Recorder()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    # with so large an epsilon, AdamW's first update is the gradient times lr / eps
    settings |= {"lr": 1e3, "adam_eps": 1e3, "max_steps": 4, "progress": progress, "stop_requested": lambda: True}
    with pytest.raises(Interrupted):
        training(model, folder, **settings).run()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return float((after - before).norm()), progress.steps[1]["grad_norm"]


@pytest.mark.parametrize("limit", [0.25, 1e6])
def test_a_large_gradient_is_scaled_down_to_the_limit(base: ModelSource, tmp_path: Path, limit: float) -> None:
    update, norm = first_update(base, tmp_path, max_grad_norm=limit, warmup_ratio=0.0)
    assert update == pytest.approx(min(limit, norm), rel=1e-2)


def test_the_schedule_reaches_the_optimizer(base: ModelSource, tmp_path: Path) -> None:
    update, norm = first_update(base, tmp_path, max_grad_norm=1e6, warmup_ratio=1.0)
    assert update == pytest.approx(norm / 4, rel=1e-2)


def test_dropout_is_active_while_training(base: ModelSource, tmp_path: Path) -> None:
    norms = []
    for dropout in (0.0, 0.5):
        model = new_adapter(load_model(base, "float32"), replace(DROPOUT, dropout=dropout), seed=0)
        progress = Recorder()
        training(model, tmp_path / str(dropout), progress=progress, max_steps=1).run()
        norms.append(progress.steps[1]["grad_norm"])
    assert norms[1] != pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize("enabled", [False, True])
def test_gradient_checkpointing_runs_each_layer_twice(base: ModelSource, tmp_path: Path, enabled: bool) -> None:
    model, calls = policy(base, Method.full), Counter[bool]()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: calls.update([module.training]))
    training(model, tmp_path, max_steps=1, gradient_checkpointing=enabled).run()
    forward_passes = 3  # the rehearsal, and two of the step
    assert calls[True] == forward_passes * (2 if enabled else 1)


def test_frozen_weights_stay_as_they_are(base: ModelSource, tmp_path: Path) -> None:
    model = policy(base, Method.lora)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    training(model, tmp_path).run()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


# --- Repeating and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "dtype"), KINDS)
def test_killed_at_every_step_it_ends_with_the_same_bytes(
    base: ModelSource, tmp_path: Path, method: Method, dtype: str
) -> None:
    settings = {"dtype": dtype, "gradient_accumulation": 2, "epochs": 2, "checkpoint_steps": 2}
    whole = policy(base, method, dtype)
    uninterrupted = Recorder()
    end = training(whole, tmp_path / "whole", progress=uninterrupted, **settings).run()
    for step in range(1, end.step + 1):
        with pytest.raises(Killed):
            training(policy(base, method, dtype), tmp_path / "killed", progress=Recorder(step), **settings).run()
    model, progress = policy(base, method, dtype), Recorder()
    again = training(model, tmp_path / "killed", progress=progress, **settings).run()
    assert trained_bytes(model) == trained_bytes(whole)
    assert again == end
    assert progress.started == (6, 4)
    assert progress.steps == {step: uninterrupted.steps[step] for step in (5, 6)}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(base: ModelSource, tmp_path: Path) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(1)  # the caller's random numbers must not matter
        model = policy(base, Method.lora)
        training(model, tmp_path / name, seed=seed).run()
        results.append(trained_bytes(model))
    assert results[0] == results[1] != results[2]


def test_training_leaves_the_callers_random_numbers_alone(base: ModelSource, tmp_path: Path) -> None:
    model = policy(base, Method.lora)
    before = torch.get_rng_state()
    training(model, tmp_path).run()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_batch_of_a_step_is_reported(base: ModelSource, tmp_path: Path) -> None:
    progress = Recorder()
    settings = {"per_device_batch_size": 1, "gradient_accumulation": 2, "max_steps": 2}
    training(policy(base, Method.lora), tmp_path, progress=progress, **settings).run()
    assert progress.parts == [(1, 2, "row"), (2, 2, "row")] * 2


def test_a_requested_stop_saves_and_loses_nothing(base: ModelSource, tmp_path: Path) -> None:
    settings = {"checkpoint_steps": 50, "epochs": 2}
    whole = policy(base, Method.lora)
    training(whole, tmp_path / "whole", **settings).run()
    progress = Recorder()
    stopping: dict[str, Any] = {**settings, "progress": progress, "stop_requested": lambda: 3 in progress.steps}
    with pytest.raises(Interrupted, match="stopped after step 3 of 6"):
        training(policy(base, Method.lora), tmp_path / "cut", **stopping).run()
    model, rest = policy(base, Method.lora), Recorder()
    training(model, tmp_path / "cut", progress=rest, **settings).run()
    assert list(rest.steps) == [4, 5, 6]
    assert trained_bytes(model) == trained_bytes(whole)


def test_a_checkpoint_of_other_data_is_not_continued(base: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        training(policy(base, Method.lora), tmp_path, progress=Recorder(2)).run()
    progress = Recorder()
    training(policy(base, Method.lora), tmp_path, rows=packed_rows([2, 2, 2], seed=9), progress=progress).run()
    assert progress.started[1] == 0
    assert "belongs to a run with other settings or data" in progress.notes[-1]


@pytest.mark.parametrize(("method", "dtype"), KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_steps": 1},
        {"checkpoint_minutes": 1.5, "checkpoint_steps": None},
        {"gradient_checkpointing": True},
        {"data": "moved/train.jsonl", "gate": GateConfig(confidence=0.9)},
    ],
    ids=lambda change: "+".join(change),
)
def test_settings_that_change_no_number_resume_to_the_same_bytes(
    base: ModelSource, tmp_path: Path, change: dict[str, Any], method: Method, dtype: str
) -> None:
    settings = {"dtype": dtype, "epochs": 2, "checkpoint_steps": 2}
    training(whole := policy(base, method, dtype), tmp_path / "whole", **settings).run()
    with pytest.raises(Killed):
        training(policy(base, method, dtype), tmp_path / "killed", progress=Recorder(4), **settings).run()
    model, progress = policy(base, method, dtype), Recorder()
    training(model, tmp_path / "killed", progress=progress, **(settings | change)).run()
    assert progress.started == (6, 2)
    assert trained_bytes(model) == trained_bytes(whole)


# --- Divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_at_once(
    base: ModelSource, tmp_path: Path, value: float, step: int
) -> None:
    model, progress = policy(base, Method.full), Recorder()
    backward_passes = Counter[str]()

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        backward_passes["done"] += 1
        # the first pass is the rehearsal, and a step has two
        return gradient * value if backward_passes["done"] == 2 * step else gradient

    model.model.norm.weight.register_hook(poison)
    with pytest.raises(Diverged, match=rf"diverged at step {step}: the gradient norm is (nan|inf).*Lower lr"):
        training(model, tmp_path, progress=progress).run()
    assert list(progress.steps) == list(range(1, step))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_rate_that_is_far_too_high_is_reported_as_divergence(base: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"training diverged at step \d: the loss is nan"):
        training(policy(base, Method.full), tmp_path, lr=1e30, epochs=4, warmup_ratio=0.0).run()
