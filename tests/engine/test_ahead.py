"""A step in which nothing waits: no value is asked of the device, and all that it gets is queued, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.config.schema import LoraSettings, Method
from posttrain.engine import ahead, answers, attention, attention_kernels, batches, loop, neftune
from posttrain.engine.ahead import on_device, prepared_ahead
from posttrain.engine.attention import install
from posttrain.engine.engine import Single
from posttrain.engine.gradient import MaskedCrossEntropy, StepBatches
from posttrain.errors import Diverged, Interrupted
from posttrain.model.loading import new_adapter
from tests.support.tiny import Recorder, base_source, packed_rows, sft_config, tiny_llama, write_base
from tests.support.training import policy, trained_bytes, training

CPU, GPU = torch.device("cpu"), torch.device("meta")
"""A device without numbers stands for the GPU: whatever asks it for a value fails, as boolean indexing does."""
ROWS = packed_rows([3, 1, 2, 2, 1])
MODULES = (answers, attention, attention_kernels, batches, neftune)


class Copies(TorchDispatchMode):
    """Collects the operations that bring a tensor from the CPU to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        made = [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
        if any(each.device == CPU and each.ndim for each in given) and any(each.device == GPU for each in made):
            self.found.append(str(func))
        return result


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was sent by ``on_device``."""
    sizes: list[int] = []

    def queued(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert tensor.device == CPU
        if device == CPU:
            return tensor
        sizes.append(tensor.numel())
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    plain = torch.tensor

    def made(*values: Any, device: Any = CPU, **options: Any) -> torch.Tensor:
        assert torch.device(device) == CPU, "a tensor made on the device is a copy that waits"
        return plain(*values, **options)

    for module in MODULES:
        monkeypatch.setattr(module, "on_device", queued)
    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no such device
    return sizes


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kernel", ["posttrain_documents", "eager"])
@pytest.mark.parametrize("method", [Method.lora, Method.full])
def test_no_batch_of_a_step_waits_for_the_device(
    method: Method, kernel: str, recomputed: bool, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        attention_kernels, "KERNELS", [each for each in attention_kernels.KERNELS if each.name == kernel]
    )
    causal = tiny_llama()
    model: Any = causal if method is Method.full else new_adapter(causal, LoraSettings(r=4, alpha=8, dropout=0.1), 0)
    install(model)
    if recomputed:
        causal.activation_checkpointing_enable()
    model.train().to(GPU)
    config = sft_config(neftune_alpha=5.0, method=method)
    objective = MaskedCrossEntropy(config, "float32")
    sent.clear()
    with Copies() as copies:
        step = StepBatches.of(objective, [[row] for row in ROWS], objective.totals(ROWS), GPU)
        engine = Single(model, config)
        for _, _, _, batch in step.dealt:
            engine.accumulate(lambda batch=batch: objective.share(model, batch, step.totals), last=True)  # type: ignore[misc]
    assert copies.found == []
    assert len(sent) >= 5 * len(ROWS), "ids, positions, bounds and targets of each row are sent"
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("shared", [False, True])
def test_no_batch_of_answers_waits_for_the_device(shared: bool, sent: list[int]) -> None:
    model = new_adapter(tiny_llama(), LoraSettings(r=4, alpha=8), 0)
    install(model)
    model.train().to(GPU)
    rows = [([4, 5, 6], [[7, 8], [9]]), ([4, 5], [[6], [7, 8, 9]])]
    with Copies() as copies:
        batch = answers.AnswerBatch.of(rows, GPU, shared)
        batch.log_probs(model, sft_config(), "float32", noise=5.0).sum().backward()
    assert copies.found == []
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_a_gpu_gets_tensors_from_pinned_memory_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    tensor = torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *to, **how: calls.append((to, how)) or self)
    on_device(tensor, torch.device("cuda", 1))
    assert calls == ["pinned", ((torch.device("cuda", 1),), {"non_blocking": True})]


def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare steps ahead, as for a GPU."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        loop, "prepared_ahead", lambda prepare, items, device: prepared_ahead(prepare, items, torch.device("cuda", 0))
    )


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("rows")]


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Any]:
    base = base_source(write_base(tmp_path / "base"))
    return lambda: policy(base, Method.lora)


def test_steps_prepared_ahead_are_the_same_stopped_or_not(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training(expected := fresh(), tmp_path / "expected", neftune_alpha=5.0).run()
    in_a_thread(monkeypatch)
    training(whole := fresh(), tmp_path / "whole", neftune_alpha=5.0).run()
    progress = Recorder()
    with pytest.raises(Interrupted):
        training(
            fresh(), tmp_path / "cut", neftune_alpha=5.0, progress=progress, stop_requested=lambda: 3 in progress.steps
        ).run()
    assert not threads()
    training(resumed := fresh(), tmp_path / "cut", neftune_alpha=5.0).run()
    assert trained_bytes(expected) == trained_bytes(whole) == trained_bytes(resumed)
    assert not threads()


def test_an_error_in_the_thread_is_raised_in_the_training(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_thread(monkeypatch)
    begun: list[str] = []

    def batch(self: Any, rows: Any, device: torch.device) -> Any:
        begun.append(threading.current_thread().name)
        if len(begun) == 5:
            raise OSError(5, "Input/output error", "rows.bin")
        return batches.Batch.of(rows, device)

    monkeypatch.setattr(MaskedCrossEntropy, "batch", batch)
    progress = Recorder()
    with pytest.raises(OSError, match=r"Input/output error: 'rows\.bin'"):
        training(fresh(), tmp_path / "run", progress=progress).run()
    assert list(progress.steps) == [1, 2], "the steps before it are taken"
    assert {name.rpartition("_")[0] for name in begun} == {"rows"}
    assert not threads()


def test_no_thread_is_left_when_a_step_fails(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_thread(monkeypatch)
    with pytest.raises(Diverged):
        training(fresh(), tmp_path / "run", lr=1e30, epochs=4, warmup_ratio=0.0).run()
    assert not threads()


def test_one_step_is_prepared_while_another_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    second = threading.Event()

    def prepare(item: int) -> int:
        if item == 2:
            second.set()
        assert item < 4, "none is prepared further ahead"
        return item * 10

    with prepared_ahead(prepare, range(1, 9), torch.device("cuda", 0)) as prepared:
        assert next(prepared) == 10
        assert second.wait(60)
        assert next(prepared) == 20
    assert not threads()


def test_a_cpu_prepares_what_it_is_asked_for() -> None:
    made: list[int] = []
    with prepared_ahead(lambda item: made.append(item) or item, range(5), CPU) as prepared:
        assert next(prepared) == 0
        assert made == [0]
    assert ahead.on_device(tensor := torch.arange(2), CPU) is tensor
