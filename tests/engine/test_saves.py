"""Checkpoints by time, written in the background: steps go on, the copy is of its step, errors stop the run."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from posttrain.artifact import ModelSource
from posttrain.config.schema import Method
from posttrain.engine import checkpoint, saves
from posttrain.errors import Interrupted
from tests.support.tiny import Killed, Recorder, base_source, packed_rows, write_base
from tests.support.training import policy, trained_bytes, training

ROWS = packed_rows([2] * 8)
SEVEN: dict[str, Any] = {"max_steps": 7, "epochs": 2, "checkpoint_steps": None}


@pytest.fixture
def base(tmp_path: Path) -> ModelSource:
    return base_source(write_base(tmp_path / "base"))


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


class Clock:
    """Minutes that pass with every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.minutes = 0.0
        monkeypatch.setattr(saves.time, "monotonic", lambda: 60 * self.minutes)


class Passing(Recorder):
    """A Progress whose steps take four minutes each, and that may die in one."""

    def __init__(self, clock: Clock, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self._clock = clock

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._clock.minutes += 4
        super().step(step, metrics)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"checkpoint_minutes": 10.0}, ["step-00000003", "step-00000006"]),
        ({"checkpoint_minutes": 10.0, "checkpoint_steps": 5}, ["step-00000003", "step-00000005"]),
        ({"checkpoint_minutes": 100.0}, []),
    ],
)
def test_a_checkpoint_is_due_by_time_and_by_steps(
    settings: dict[str, Any],
    expected: list[str],
    base: ModelSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    progress = Passing(Clock(monkeypatch))
    # wait for each, so that none is put off
    monkeypatch.setattr(threading.Thread, "is_alive", lambda self: bool(self.join()))
    run = training(policy(base, Method.lora), tmp_path / "c", ROWS, progress=progress, **(SEVEN | settings))
    run.run()
    assert kept(tmp_path / "c") == expected


def test_a_slow_disk_holds_up_no_step_and_its_checkpoint_is_of_its_own_step(
    base: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SEVEN | {"checkpoint_minutes": 1e-9}
    training(whole := policy(base, Method.lora), tmp_path / "whole", ROWS, **settings).run()
    written, save_file = threading.Event(), checkpoint.save_file

    def slow(*given: Any) -> None:
        assert written.wait(60), "the training waits for the disk"
        save_file(*given)

    monkeypatch.setattr(checkpoint, "save_file", slow)

    class Dying(Recorder):
        def step(self, step: int, metrics: Mapping[str, float]) -> None:
            super().step(step, metrics)
            if step == 5:
                written.set()
                raise Killed

    killed = policy(base, Method.lora)
    with pytest.raises(Killed):
        training(killed, tmp_path / "c", ROWS, progress=Dying(), **settings).run()
    assert kept(tmp_path / "c") == ["step-00000001"], "the only one begun, of the weights of its step"
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    progress = Recorder()
    training(resumed := policy(base, Method.lora), tmp_path / "c", ROWS, progress=progress, **settings).run()
    assert min(progress.steps) == 2
    assert trained_bytes(resumed) == trained_bytes(whole)


@pytest.mark.parametrize("moment", ["in the middle", "at the end"])
def test_a_full_disk_stops_the_run(
    moment: str, base: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 1 if moment == "in the middle" else 6

    def full(*_: Any) -> None:
        raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")

    monkeypatch.setattr(checkpoint, "save_file", full)
    progress = Recorder()
    settings = SEVEN | {"checkpoint_steps": steps, "checkpoint_minutes": 1e9}
    with pytest.raises(OSError, match="No space left on device") as caught:
        training(policy(base, Method.lora), tmp_path / "c", ROWS, progress=progress, **settings).run()
    assert "step-0000000" in str(caught.value.filename), "the message names the checkpoint"
    assert moment == "at the end" or max(progress.steps) < 7
    assert not list((tmp_path / "c").glob("*"))[1:], "no draft is left"


def test_a_stop_waits_until_its_checkpoint_is_whole(base: ModelSource, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    run = training(policy(base, Method.lora), tmp_path / "c", ROWS, **SEVEN, stop_requested=lambda: next(asked))
    with pytest.raises(Interrupted, match="stopped after step 3 of 7"):
        run.run()
    assert kept(tmp_path / "c") == ["step-00000003"]
    assert not [each for each in threading.enumerate() if each.name == "checkpoint"]


def test_the_copy_is_memory_of_its_own() -> None:
    weights = torch.ones(3)
    part = checkpoint.Part.of({"weight/a": weights}, copy=True)
    weights.zero_()
    assert torch.equal(part.tensors["weight/a"], torch.ones(3))
