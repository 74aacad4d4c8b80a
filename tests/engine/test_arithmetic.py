"""The number format of the arithmetic: measured once, recorded in the run, the same ever after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.config.on_policy import OnPolicy
from posttrain.config.schema import Dtype, Method
from posttrain.engine import arithmetic
from posttrain.engine.arithmetic import (
    ADAPTED,
    FORWARD,
    TRAINED,
    Rates,
    choose_arithmetic,
    choose_inference,
    measure_rates,
    multiplied_shapes,
)
from posttrain.errors import Interrupted
from posttrain.model.loading import load_model, load_trainable, new_adapter, number_format
from posttrain.sampling.answers import Asking
from posttrain.serve.catalogue import Served
from posttrain.serve.models import Models
from tests.support.tiny import base_source, sft_config, write_base
from tests.support.training import trained_bytes, training

SLOW, FAST = Rates(float32=100.0, bfloat16=50.0), Rates(float32=100.0, bfloat16=300.0)


@pytest.fixture
def adapter(tmp_path: Path) -> Any:
    return new_adapter(load_model(base_source(write_base(tmp_path / "base")), "bfloat16"), sft_config().lora, seed=0)


def measuring(rates: Rates | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every measurement give ``rates``; with None, let none be made."""

    def measured(*_: Any) -> Rates:
        assert rates is not None, "nothing is to be measured"
        return rates

    monkeypatch.setattr(arithmetic, "measure_rates", measured)


@pytest.mark.parametrize(
    ("rates", "expected", "note"),
    [
        (SLOW, "float32", "float32 on weights stored as bfloat16 (measured: 100 against 50 GFLOP/s)"),
        (FAST, "bfloat16", "bfloat16 on weights stored as bfloat16 (measured: 300 against 100 GFLOP/s)"),
        (
            Rates(float32=100.0, bfloat16=105.0),
            "float32",
            "float32 on weights stored as bfloat16 (measured: 100 against 105 GFLOP/s)",
        ),
    ],
)
def test_the_faster_format_is_taken_and_said(
    rates: Rates, expected: str, note: str, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring(rates, monkeypatch)
    chosen = choose_arithmetic(sft_config(), "bfloat16", adapter, tmp_path / "run" / "rates.json")
    assert (chosen.dtype, str(chosen)) == (expected, note)


@pytest.mark.parametrize(
    ("asked", "stored", "device", "expected"),
    [
        (None, "float32", "cpu", "float32"),
        (None, "bfloat16", "cuda", "bfloat16"),
        (Dtype.bfloat16, "bfloat16", "cpu", "bfloat16"),
        (Dtype.float32, "bfloat16", "cpu", "float32"),
        (Dtype.float32, "bfloat16", "cuda", "float32"),
    ],
)
def test_nothing_is_measured_where_the_format_is_given(
    asked: Dtype | None, stored: str, device: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring(None, monkeypatch)
    monkeypatch.setattr(arithmetic, "default_device", lambda: torch.device(device))
    model: Any = SimpleNamespace()
    chosen = choose_arithmetic(sft_config(compute_dtype=asked), stored, model, tmp_path / "rates.json")
    assert str(chosen) == f"{expected} on weights stored as {stored}"
    assert not (tmp_path / "rates.json").exists()


def test_a_run_keeps_its_format_and_a_machine_too(
    adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "one" / "rates.json", tmp_path / "two" / "rates.json"
    measuring(FAST, monkeypatch)
    choose_arithmetic(sft_config(), "bfloat16", adapter, first)
    measuring(SLOW, monkeypatch)  # the machine is busy now
    assert choose_arithmetic(sft_config(), "bfloat16", adapter, first).dtype == "bfloat16", "as recorded in the run"
    assert choose_arithmetic(sft_config(), "bfloat16", adapter, second).dtype == "bfloat16", "as cached"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert choose_arithmetic(sft_config(), "bfloat16", adapter, first).dtype == "bfloat16", "moved with its run"
    assert choose_arithmetic(sft_config(), "bfloat16", adapter, tmp_path / "three.json").dtype == "float32"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"float32": 1.0}', '{"float32": -1.0, "bfloat16": 5.0}'])
def test_damaged_rates_are_measured_again(
    text: str, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "rates.json"
    record.write_text(text)
    measuring(FAST, monkeypatch)
    assert choose_arithmetic(sft_config(), "bfloat16", adapter, record).dtype == "bfloat16"
    measuring(None, monkeypatch)
    assert choose_arithmetic(sft_config(), "bfloat16", adapter, record).dtype == "bfloat16"


def test_a_home_that_cannot_be_written_costs_the_cache_alone(
    adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    measuring(FAST, monkeypatch)
    assert choose_arithmetic(sft_config(), "bfloat16", adapter, tmp_path / "rates.json").dtype == "bfloat16"
    assert (tmp_path / "rates.json").is_file()


@pytest.mark.parametrize("method", [Method.lora, Method.full])
def test_products_of_the_models_own_layers_are_timed(method: Method, tmp_path: Path) -> None:
    source = base_source(write_base(tmp_path / "base"))
    model: Any = load_trainable(source, "bfloat16")
    if method is Method.lora:
        model = new_adapter(load_model(source, "bfloat16"), sft_config().lora, seed=0)
    shapes, config = multiplied_shapes(model), model.config
    assert sum(shapes.values()) == 7 * config.num_hidden_layers, "no embedding, no adapter"
    assert (config.intermediate_size, config.hidden_size) in shapes
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for passes in (FORWARD, ADAPTED, TRAINED):
        rates = measure_rates(shapes, tokens=8, passes=passes)
        assert min(rates.of("float32"), rates.of("bfloat16")) > 0
    assert torch.equal(torch.rand(1), expected), "random numbers are left as they were"


@pytest.mark.parametrize(
    ("rates", "expected"),
    [(SLOW, "float32"), (FAST, "bfloat16"), (Rates(float32=105.0, bfloat16=100.0), "bfloat16")],
)
def test_a_model_that_only_answers_leaves_bfloat16_for_what_is_faster(
    rates: Rates, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = base_source(write_base(tmp_path / "base"))
    measuring(rates, monkeypatch)
    assert choose_inference("bfloat16", source) == expected
    measuring(None, monkeypatch)
    assert choose_inference("bfloat16", source) == expected, "as cached"
    assert choose_inference("float32", source) == "float32"
    assert choose_inference("bfloat16", replace(source, quantization={"load_in_4bit": True})) == "bfloat16"
    with monkeypatch.context() as full:
        full.setattr(arithmetic, "device_memory", lambda: 100_000)
        assert choose_inference("bfloat16", source) == "bfloat16", "no memory for twice the size"
    monkeypatch.setattr(arithmetic, "default_device", lambda: torch.device("cuda"))
    assert choose_inference("bfloat16", source) == "bfloat16"


def test_products_too_short_for_the_clock_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_clock", lambda device: 1.0)
    rates = measure_rates({(8, 8): 2}, tokens=8, passes=FORWARD)
    assert rates.float32 == rates.bfloat16
    assert choose_inference("bfloat16", base_source(write_base(tmp_path / "base"))) == "bfloat16"


@pytest.mark.parametrize(("rates", "expected"), [(SLOW, "float32"), (FAST, "bfloat16")])
def test_served_and_sampled_answers_are_computed_like_the_scored_ones(
    rates: Rates, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = base_source(write_base(tmp_path / "base"))
    measuring(rates, monkeypatch)
    models = Models()
    models.add(Served(name="base", digest=source.digest, source=source, base=source, dtype="bfloat16"))
    assert str(models.alone(source.digest).dtype) == f"torch.{expected}"
    settings = OnPolicy(questions="questions.jsonl")
    asking = Asking.of(
        settings, "backend", source=source, base=source, dtype="bfloat16", kept=tmp_path, part=lambda *_: None,
        stop_requested=lambda: False,
    )  # fmt: skip
    assert asking.dtype == number_format("bfloat16", expected)


def test_a_resumed_training_computes_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> Any:
        return new_adapter(
            load_model(base_source(write_base(tmp_path / "base")), "bfloat16"), sft_config().lora, seed=0
        )

    settings: dict[str, Any] = {"dtype": "bfloat16", "compute_dtype": None, "max_steps": 2, "checkpoint_steps": 1}
    measuring(FAST, monkeypatch)
    training(whole := fresh(), tmp_path / "whole", **settings).run()
    cut = fresh()
    with pytest.raises(Interrupted):
        training(cut, tmp_path / "cut", **settings, stop_requested=lambda: True).run()
    measuring(SLOW, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    training(resumed := fresh(), tmp_path / "cut", **settings).run()
    assert trained_bytes(resumed) == trained_bytes(whole)
