"""The model FLOPs of a step, against figures by hand and the products that torch counts, and their share of a rate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from posttrain.config.schema import LoraSettings, Method
from posttrain.cost.architecture import architecture_of
from posttrain.cost.operations import Operations, Work
from posttrain.engine import arithmetic
from posttrain.engine.arithmetic import Rates
from posttrain.engine.throughput import operations_of
from posttrain.model.loading import load_model, load_trainable, new_adapter
from posttrain.run import display
from posttrain.run.display import Display, TrainingProgress
from tests.support.tiny import Recorder, base_source, packed_rows, tiny_llama, write_base
from tests.support.training import training

# the tiny Llama: width 32, MLP 48, 4 query heads and 2 key heads of 8, 2 layers, 128 tokens
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
PROJECTION = 128 * 32
RANK = 4
ADAPTER = 2 * RANK * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48))


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in model.named_parameters()}


def operations(model: Any, adapter: int | None = None) -> Operations:
    found = architecture_of(model.config.to_dict(), shapes_of(model))
    assert found is not None
    return Operations(model=found, adapter=adapter)


def policy(folder: Path, method: Method, **lora: Any) -> Any:
    source = base_source(write_base(folder / "base"))
    if method is Method.full:
        return load_trainable(source, "float32")
    return new_adapter(load_model(source, "float32"), LoraSettings(r=RANK, alpha=8, **lora), seed=0)


def test_full_training_takes_six_operations_a_weight() -> None:
    # two documents of 3 and 2 tokens, with 3 + 2 + 1 and 2 + 1 pairs, in layers whose queries are 32 wide
    expected = 6 * 5 * 2 * LAYER + 6 * 4 * PROJECTION + 2 * 12 * 32 * (6 + 3)
    assert operations(tiny_llama()).of([Work(families=[(3, ()), (2, ())], scored=4)]) == expected


def test_an_adapter_takes_four_and_six_for_its_own_weights() -> None:
    expected = 5 * (4 * 2 * LAYER + 6 * 100) + 4 * 4 * PROJECTION + 2 * 12 * 32 * 15
    assert operations(tiny_llama(), adapter=100).of([Work(families=[(5, ())], scored=4)]) == expected


def test_a_prompt_counts_once_for_all_of_its_answers() -> None:
    # a prompt of 3, answers of 2 and 1: 6 pairs, then 4 + 5 and 4 more
    expected = 6 * 6 * 2 * LAYER + 6 * 3 * PROJECTION + 2 * 12 * 32 * (6 + 9 + 4)
    assert operations(tiny_llama()).of([Work(families=[(3, (2, 1))], scored=3)]) == expected


def test_a_pass_without_a_gradient_takes_two() -> None:
    expected = 5 * (2 * 2 * LAYER + 2 * 100) + 2 * PROJECTION + 2 * 4 * 32 * 15
    assert operations(tiny_llama(), adapter=100).of([Work(families=[(5, ())], scored=1, graph=False)]) == expected


def test_windows_and_experts_that_a_token_does_not_meet_do_not_count() -> None:
    sizes = {
        "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    attention, expert, work = 4 * 8 * 8, 3 * 8 * 12, [Work(families=[(5, ())], scored=1)]
    windowed = MistralForCausalLM(MistralConfig(**sizes, sliding_window=2))
    pairs = 1 + 2 + 2 + 2 + 2
    assert operations(windowed).of(work) == 6 * 5 * (attention + expert) + 6 * 16 * 8 + 12 * 8 * pairs
    sparse = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    router = 4 * 8
    assert operations(sparse).of(work) == 6 * 5 * (attention + 2 * expert + router) + 6 * 16 * 8 + 12 * 8 * 15


@pytest.mark.parametrize(
    ("method", "lora", "adapter"),
    [(Method.full, {}, None), (Method.lora, {}, ADAPTER), (Method.lora, {"dora": True}, ADAPTER)],
    ids=["full", "lora", "dora"],
)
def test_the_weights_of_a_model_in_memory_are_those_of_its_files(
    method: Method, lora: dict[str, Any], adapter: int | None, tmp_path: Path
) -> None:
    found = operations_of(policy(tmp_path, method, **lora))
    assert found is not None
    assert (found.model.active, found.adapter) == (2 * LAYER, adapter)


def test_the_products_are_those_that_torch_counts(tmp_path: Path) -> None:
    model, progress = policy(tmp_path, Method.full), Recorder()
    run = training(model, tmp_path / "checkpoints", packed_rows([2, 1]), progress=progress, max_steps=1)
    found = run.throughput  # measured before anything is counted
    with FlopCounterMode(display=False) as counter:
        run.run()
    assert found is not None
    whole = counter.get_flop_counts()["Global"]
    counted = sum(count for name, count in whole.items() if "attention" not in str(name))
    lengths = [length for row in run.rows for length in row.lengths]
    attended = 2 * 12 * 32 * sum(length * (length + 1) // 2 for length in lengths)
    before = _before_training(policy(tmp_path / "again", Method.full), tmp_path)
    assert progress.steps[1]["model_flops"] - attended == counted - before


def _before_training(model: Any, folder: Path) -> int:
    """Return the products of the proofs before the first step."""
    run = training(model, folder / "other", packed_rows([2, 1]), max_steps=1)
    assert run.throughput is not None
    with FlopCounterMode(display=False) as counter, run._prepared() as engine:
        run.objective.begin(engine)
    return sum(count for name, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))


def test_recomputed_layers_do_not_count(tmp_path: Path) -> None:
    flops = []
    for recomputed in (False, True):
        progress, folder = Recorder(), tmp_path / str(recomputed)
        model = policy(folder, Method.lora)
        training(model, folder, progress=progress, max_steps=1, gradient_checkpointing=recomputed).run()
        flops.append(progress.steps[1]["model_flops"])
    assert flops[0] == flops[1] > 0


def test_the_share_is_of_the_measured_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "measure_rates", lambda *_: Rates(float32=2.5))
    progress = Recorder()
    training(policy(tmp_path, Method.lora), tmp_path / "checkpoints", progress=progress, max_steps=1).run()
    assert progress.device_flops == 2.5e9
    assert "speed: mfu is the share of 2 GFLOP/s, measured in products of the model's shapes" in progress.notes


def test_speed_is_shown_logged_and_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [100.0], []
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    host = SimpleNamespace(hook=SimpleNamespace(step_logged=lambda **logged: sent.append(logged["metrics"])))
    progress = TrainingProgress(Display(), "sft", tmp_path / "metrics.jsonl", host)
    shown: list[str] = []
    monkeypatch.setattr(progress._ticker, "advance", lambda done, total, figures: shown.append(figures))
    progress.start(10, device_flops=6e9)
    for step in (1, 2):
        now[0] += 2.0
        progress.step(step, {"loss": 1.0, "tokens": 100, "model_flops": 3e9})
    assert shown[-1] == "loss 1.000  50 tokens/s  mfu 25%"
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["mfu"] for line in logged] == [0.25, 0.25]
    assert sent[-1] == {"loss": 1.0, "tokens": 100, "model_flops": 3e9, "tokens_per_second": 50.0, "mfu": 0.25}
