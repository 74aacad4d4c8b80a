"""Mistakes of a user: one clear message, the documented exit code, no traceback, and nothing is lost."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import cli
from tests.support.tiny import write_base

RECIPE = """\
defaults: [/stage@sft: sft, /gate@sft.gate: none, /stage@dpo: dpo, /gate@dpo.gate: none, _self_]
model: {path: base, dtype: float32}
sft: {data: train.jsonl, lr: 1e-2, sequence_length: 64, gradient_accumulation: 1, max_steps: 3, checkpoint_steps: 1}
dpo: {data: pairs.jsonl, lr: 1e-3, max_steps: 1}
"""
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def project(working_folder: Path, tiny_base: Path) -> Path:
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    write("train.jsonl", *[CHAT] * 4)
    write("pairs.jsonl", *[{"prompt": "hi", "chosen": "hello", "rejected": "no"}] * 4)
    base = working_folder / "base"
    base.mkdir()
    for path in tiny_base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    return working_folder


def write(name: str, *rows: object) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def damage_weights() -> None:
    tensors = load_file("base/model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, "base/model.safetensors", metadata={"format": "pt"})


def cut_weights() -> None:
    path = Path("base/model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


DIVERGING = ["sft.lr=1e30", "sft.max_grad_norm=1e30", "sft.warmup_ratio=0"]
CASES: dict[str, tuple[Callable[[], object], list[str], int, str]] = {
    "unknown recipe": (lambda: None, ["recipe=mien"], 2, "Did you mean mine?"),
    "unknown key": (lambda: None, ["recipe=mine", "sft.learning_rate=1"], 2, "unknown key 'sft.learning_rate'"),
    "wrong type": (lambda: None, ["recipe=mine", "sft.epochs=many"], 2, "sft.epochs=many"),
    "missing value": (lambda: None, ["recipe=mine", "dpo.data=???"], 2, "dpo.data"),
    "no sft": (lambda: None, ["recipe=mine", "stages=[dpo]"], 2, "SFT is mandatory"),
    "missing file": (lambda: None, ["recipe=mine", "sft.data=trian.jsonl"], 2, "Did you mean train.jsonl?"),
    "missing model": (lambda: None, ["recipe=mine", "model.path=./bsae"], 2, "base?"),
    "bad pair": (lambda: write("pairs.jsonl", CHAT), ["recipe=mine"], 2, "pairs.jsonl:1"),
    "NaN in weights": (damage_weights, ["recipe=mine"], 2, "NaN"),
    "cut weights": (cut_weights, ["recipe=mine"], 2, "model.safetensors"),
    "NaN in loss": (lambda: None, ["recipe=mine", *DIVERGING], 5, "diverged at step"),
    "no-op adapter": (lambda: None, ["recipe=mine", "sft.lr=0"], 5, "changes nothing"),
    "no such target": (lambda: None, ["recipe=mine", "sft.lora.target_modules=[q_porj]"], 2, "q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_message_and_the_documented_code(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, words, code, message = CASES[case]
    spoil()
    assert run(*words) == code
    captured = capfd.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not list(Path("runs").rglob("artifact/manifest.json"))


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    return int(caught.value.code or 0)


def test_wrong_recipes_write_nothing(project: Path) -> None:
    assert run("recipe=mine", "sft.lr=fast", "dpo.bta=1") == 2
    assert not (project / "runs").exists()


@pytest.fixture
def finished(project: Path) -> Path:
    """The directory of a run that went well."""
    assert run("recipe=mine") == 0
    (state,) = (project / "runs").glob("*/run.json")
    return state.parent


def test_a_damaged_artifact(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = finished / "stages/sft/artifact/adapter_model.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert run("recipe=mine") == 5
    captured = capfd.readouterr()
    assert "adapter_model.safetensors is damaged" in captured.err
    assert "Traceback" not in captured.err
    path.write_bytes(sound)
    assert run("recipe=mine") == 0


def test_two_runs_in_one_directory(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (finished / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("recipe=mine") == 2
    assert "writes this run" in capfd.readouterr().err


def test_a_full_disk_while_training(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import errno
    import os

    adapter = (finished / "stages/sft/artifact/adapter_model.safetensors").read_bytes()
    original = os.fsync
    left = iter(range(12))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run("recipe=mine", "output_root=other") == 2
    captured = capfd.readouterr()
    assert "No space left on device" in captured.err
    assert "make room" in captured.err
    assert "Traceback" not in captured.err
    assert run("recipe=mine", "output_root=other") == 0
    (again,) = Path("other").rglob("sft/artifact/adapter_model.safetensors")
    assert again.read_bytes() == adapter


def test_the_sft_run_that_finished_has_trained(finished: Path) -> None:
    weights = load_file(finished / "stages/sft/artifact/adapter_model.safetensors")
    assert any(torch.count_nonzero(tensor) for name, tensor in weights.items() if "lora_B" in name)


OUT_OF_MEMORY: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
    MemoryError(),
]
PHASES = [
    "posttrain.model.loading._load_weights",
    "posttrain.engine.loop.add_shares",
    "posttrain.engine.engine.update_weights",
    "posttrain.engine.engine.capture",
    "posttrain.model.saving.get_peft_model_state_dict",
    "posttrain.model.reloading.probe_both",
    "posttrain.run.train.publish",
    "posttrain.engine.answer_objective.AnswerObjective.share",
]


@pytest.mark.parametrize("phase", PHASES)
def test_memory_that_runs_out_in_any_phase(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], phase: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OUT_OF_MEMORY[PHASES.index(phase) % len(OUT_OF_MEMORY)]

    words = ["recipe=mine"] if "answer" in phase else ["recipe=mine", "stages=[sft]"]
    with monkeypatch.context() as patch:
        patch.setattr(phase, full)
        assert run(*words) == 2
    captured = capfd.readouterr()
    assert "memory: it ran out" in captured.err
    assert "per_device_batch_size" in captured.err
    assert "Traceback" not in captured.err
    (state,) = project.glob("runs/*/run.json")
    assert json.loads(state.read_text())["state"] == "failed"
    assert run(*words) == 0
