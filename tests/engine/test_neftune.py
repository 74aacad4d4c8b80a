"""NEFTune: the paper's scale for every document, in training alone, exact when continued."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from posttrain.artifact import ModelSource
from posttrain.config.schema import Method
from posttrain.engine import processes
from posttrain.engine.attention import install, packed_hidden
from posttrain.engine.gradient import StepBatches, add_gradient, add_shares, trained_tokens
from posttrain.engine.loop import _seed_of
from posttrain.engine.neftune import noise_like, noisy_embeddings
from tests.support.tiny import Killed, Recorder, base_source, packed_rows, sft_config, tiny_llama, write_base
from tests.support.training import policy, trained_bytes, training

ALPHA = 5.0
LENGTHS = [4, 50, 200]
WIDTH = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return base_source(write_base(tmp_path_factory.mktemp("models") / "base"))


class Drawing:
    """An objective, and the model and engine of it, that keeps the numbers drawn for each batch."""

    model = None

    def __init__(self) -> None:
        self.drawn: list[tuple[float, ...]] = []

    def batch(self, rows: Any, device: Any) -> Any:
        return rows

    def share(self, *given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.drawn.append(tuple(torch.rand(3).tolist()))
        return torch.zeros(()), {}

    def accumulate(self, compute: Any, last: bool) -> dict[str, torch.Tensor]:
        compute()
        return {}


def drawn(monkeypatch: pytest.MonkeyPatch, world: int, step: int = 1) -> list[list[tuple[float, ...]]]:
    """The numbers that each of ``world`` processes draws in a step of seven batches."""
    found = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "world", lambda: world)
        one: Any = Drawing()
        batches = StepBatches.of(one, [[0]] * 7, {}, torch.device("cpu"))
        with torch.random.fork_rng():
            torch.manual_seed(rank)
            add_shares(one, one, batches, seeds=partial(_seed_of, 0, step))
        found.append(one.drawn)
    return found


def test_several_processes_draw_each_its_own_numbers_and_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    two, three = drawn(monkeypatch, 2), drawn(monkeypatch, 3)
    # what is left over is drawn as for the first batch, and counts for nothing
    assert {each for rank in two for each in rank} == {each for rank in three for each in rank}
    assert len({each for rank in two for each in rank}) == 7
    assert not set(two[0][:3]) & set(two[1][:3])
    assert drawn(monkeypatch, 2) == two
    assert not {each for rank in drawn(monkeypatch, 2, step=2) for each in rank} & set(two[0])


def test_the_noise_of_each_document_is_uniform_at_the_papers_scale() -> None:
    torch.manual_seed(0)
    noise = noise_like(torch.zeros(1, sum(LENGTHS), WIDTH), LENGTHS, ALPHA)[0]
    for length, part in zip(LENGTHS, noise.split(LENGTHS), strict=True):
        bound = ALPHA / math.sqrt(length * WIDTH)
        values = part.flatten().double().numpy()
        assert abs(values).max() <= bound
        assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.01


def test_a_packed_document_gets_noise_of_the_same_size_as_alone() -> None:
    torch.manual_seed(0)
    packed = noise_like(torch.zeros(1, sum(LENGTHS), WIDTH), LENGTHS, ALPHA)[0].split(LENGTHS)
    for length, part in zip(LENGTHS, packed, strict=True):
        alone = noise_like(torch.zeros(1, length, WIDTH), [length], ALPHA)[0]
        assert float(part.norm()) == pytest.approx(float(alone.norm()), rel=0.15)
        # the paper: the expected squared norm is alpha squared / 3, whatever L and D are
        assert float(part.norm()) == pytest.approx(ALPHA / math.sqrt(3), rel=0.1)


def hidden(model: Any, alpha: float | None) -> torch.Tensor:
    ids_BT = torch.arange(10, 30)[None]
    with noisy_embeddings(model, [12, 8], alpha), torch.no_grad():
        return packed_hidden(model, ids_BT, [12, 8])


def test_it_is_added_while_training_alone() -> None:
    model = tiny_llama()
    install(model)
    plain = hidden(model.eval(), None)
    state = torch.get_rng_state()
    assert torch.equal(hidden(model.eval(), ALPHA), plain)
    assert torch.equal(hidden(model.train(), None), plain)
    assert torch.equal(hidden(model.train(), 0.0), plain)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = hidden(model.train(), ALPHA), hidden(model.train(), ALPHA)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, second)
    assert torch.equal(hidden(model.train(), None), plain)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_is_that_of_the_noisy_embeddings(recompute: bool) -> None:
    """Against a model whose embeddings hold the noise already, without any hook."""
    rows = packed_rows([2, 1])
    config = sft_config(neftune_alpha=ALPHA, per_device_batch_size=2)
    model, changed = tiny_llama(), tiny_llama()
    for each in (model, changed):
        install(each)
        each.train()
    if recompute:
        model.activation_checkpointing_enable()
    trained = trained_tokens(rows)
    torch.manual_seed(1)
    loss = add_gradient(model, rows, trained, config, "float32")
    lengths = [length for row in rows for length in row.lengths]
    torch.manual_seed(1)
    embedding, noise = changed.get_input_embeddings(), noise_like(torch.zeros(1, sum(lengths), 32), lengths, ALPHA)
    plain_forward = embedding.forward
    embedding.forward = lambda ids_BT: plain_forward(ids_BT) + noise
    expected = add_gradient(changed, rows, trained, sft_config(per_device_batch_size=2), "float32")
    assert loss == pytest.approx(expected, rel=1e-6)
    for (name, parameter), other in zip(model.named_parameters(), changed.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-5, atol=1e-7), name


def test_killed_anywhere_a_noisy_run_ends_with_the_same_bytes(base: ModelSource, tmp_path: Path) -> None:
    settings = {"epochs": 2, "neftune_alpha": ALPHA, "checkpoint_steps": 2}
    whole, quiet = policy(base, Method.lora), policy(base, Method.lora)
    training(whole, tmp_path / "whole", **settings).run()
    for step in (2, 4, 6):
        with pytest.raises(Killed):
            training(policy(base, Method.lora), tmp_path / "cut", progress=Recorder(step), **settings).run()
    again = policy(base, Method.lora)
    training(again, tmp_path / "cut", **settings).run()
    assert trained_bytes(again) == trained_bytes(whole)
    training(quiet, tmp_path / "quiet", **(settings | {"neftune_alpha": None})).run()
    assert trained_bytes(quiet) != trained_bytes(whole)


def test_the_eval_loss_is_measured_without_noise(base: ModelSource, tmp_path: Path) -> None:
    from tests.support.training import evaluation

    first = []
    for alpha in (None, 100.0):
        progress = Recorder()
        settings = {"neftune_alpha": alpha, "max_steps": 1}
        measured = evaluation(**settings)
        training(
            policy(base, Method.full), tmp_path / str(alpha), progress=progress, evaluation=measured, **settings
        ).run()
        first.append(progress.steps)
    assert first[0][0] == first[1][0]
    assert first[0][1]["loss"] != first[1][1]["loss"]


@pytest.mark.parametrize("alpha", [-1.0, math.nan, math.inf])
def test_an_impossible_strength_is_a_problem_by_name(alpha: float) -> None:
    assert [name for name, _ in sft_config(neftune_alpha=alpha).problems()] == ["neftune_alpha"]
