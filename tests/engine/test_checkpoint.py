"""Checkpoints are whole or absent, verified before use, and never the reason that a run is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from posttrain.engine import checkpoint
from posttrain.engine.checkpoint import CheckpointFolder, Position, State, capture, restore
from tests.support.tiny import Recorder

SMALL = {"weight/a": torch.arange(6.0), "random/cpu": torch.arange(4, dtype=torch.uint8)}


def state(step: int) -> State:
    return {name: tensor + step for name, tensor in SMALL.items()}


def opened(folder: Path, identity: str = "run") -> tuple[CheckpointFolder, Recorder]:
    told = Recorder()
    return CheckpointFolder(folder, identity, told.note), told


def saved(folder: Path, *steps: int) -> CheckpointFolder:
    checkpoints, _ = opened(folder)
    for step in steps:
        checkpoints.save(Position(step=step, loss=step / 2), state(step))
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    found = saved(tmp_path, 50).newest()
    assert found is not None
    position, tensors = found
    assert position == Position(step=50, loss=25.0)
    assert tensors.keys() == SMALL.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in state(50).items())


def test_a_folder_that_does_not_exist_has_no_checkpoint(tmp_path: Path) -> None:
    assert opened(tmp_path / "none")[0].newest() is None


def test_the_newest_two_are_kept_and_foreign_files_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    saved(tmp_path, 50, 100, 150, 123456789)
    assert names(tmp_path) == ["notes.txt", "step-00000150", "step-123456789", "step-notes"]


def test_what_a_killed_save_left_is_neither_read_nor_in_the_way(tmp_path: Path) -> None:
    draft = tmp_path / ".draft"
    draft.mkdir()
    (draft / "state.safetensors").write_bytes(b"half")
    checkpoints, told = opened(tmp_path)
    assert (checkpoints.newest(), told.notes) == (None, [])
    checkpoints.save(Position(step=1, loss=1.0), state(1))
    assert names(tmp_path) == ["step-00000001"]


def flip(path: Path) -> None:
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "state.safetensors").write_bytes(content)


def truncate(path: Path) -> None:
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-1])


def edit_step(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 100', '"step": 101'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip,
    "truncated": truncate,
    "no state": lambda path: (path / "state.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "edited manifest": edit_step,
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"step": '),
    "extra file": lambda path: (path / "more.json").write_text("{}"),
    "pickle": lambda path: (path / "state.pt").write_bytes(b"\x80"),
    "emptied": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_falls_back_to_the_older_with_a_note(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 50, 100)
    DAMAGE[damage](tmp_path / "step-00000100")
    checkpoints, told = opened(tmp_path)
    found = checkpoints.newest()
    assert found is not None
    assert found[0].step == 50
    assert len(told.notes) == 1
    assert told.notes[0].startswith("checkpoint step-00000100 is not used: ")
    checkpoints.save(Position(step=100, loss=0.0), state(100))  # the damaged one is not in the way
    again = checkpoints.newest()
    assert again is not None
    assert again[0].step == 100


def test_when_all_are_damaged_the_run_starts_over(tmp_path: Path) -> None:
    saved(tmp_path, 50, 100)
    for path in list(tmp_path.iterdir()):
        flip(path)
    checkpoints, told = opened(tmp_path)
    assert checkpoints.newest() is None
    assert len(told.notes) == 2


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, 50)
    checkpoints, told = opened(tmp_path, identity="other")
    assert checkpoints.newest() is None
    assert "belongs to a run with other settings or data" in told.notes[0]


@pytest.mark.parametrize("operation", ["mkdir", "rename", "fsync", "open"])
def test_a_refusing_disk_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    checkpoints = saved(tmp_path, 50)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    target = os if operation == "fsync" else Path
    with monkeypatch.context() as patch:
        patch.setattr(target, operation, full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(Position(step=100, loss=0.0), state(100))
    assert names(tmp_path) == ["step-00000050"]
    assert checkpoints.newest() is not None


def test_a_full_disk_in_safetensors_is_an_os_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        opened(tmp_path)[0].save(Position(step=1, loss=1.0), state(1))
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["save", "damage", "resume"]), max_size=14))
def test_any_history_resumes_from_the_newest_sound_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, history: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    checkpoints, _ = opened(folder)
    sound: list[int] = []
    kept: list[int] = []
    step = 0
    for operation in history:
        if operation == "save":
            step += 1
            checkpoints.save(Position(step=step, loss=0.0), state(step))
            kept = [*kept, step][-2:]
            sound = [*sound, step]
        elif operation == "damage" and kept and kept[-1] in sound:
            flip(folder / f"step-{kept[-1]:08d}")
            sound.remove(kept[-1])
        elif operation == "resume":
            found = checkpoints.newest()
            expected = max((one for one in kept if one in sound), default=0)
            step = found[0].step if found else 0
            assert step == expected
            kept = [one for one in kept if one <= step]
    shutil.rmtree(folder)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        loss = (model(torch.randn(5, 4)) ** 2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, fused=True)


def test_restoring_continues_exactly_with_weights_moments_and_random_numbers(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model, optimizer = make()
        steps(model, optimizer, 3)
        opened(tmp_path)[0].save(Position(step=3, loss=0.0), capture(model, optimizer))
        steps(model, optimizer, 3)
        expected = [p.detach().clone() for p in model.parameters()]

        again, optimizer = make()
        torch.rand(17)
        found = opened(tmp_path)[0].newest()
        assert found is not None
        restore(again, optimizer, found[1])
        steps(again, optimizer, 3)
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), expected, strict=True))


def test_only_trained_weights_are_captured() -> None:
    with torch.random.fork_rng():
        model, optimizer = make()
        steps(model, optimizer, 1)
        names = capture(model, optimizer)
    assert {name for name in names if name.startswith("weight/")} == {
        "weight/0.weight",
        "weight/2.weight",
        "weight/2.bias",
    }
    assert {name.split("/")[1] for name in names if name.startswith("optimizer/")} == {"step", "exp_avg", "exp_avg_sq"}
