"""Models and adapters of a stranger: a clear error, the documented code, no traceback, nothing run and nothing hung."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.model import reloading, tokenizer_watch
from posttrain.tokens import texts
from tests.support import warm
from tests.support.audit import watched
from tests.support.tiny import write_base

RECIPE = """\
defaults: [/stage@sft: sft, /gate@sft.gate: none, _self_]
model: {path: base, dtype: float32}
sft: {data: train.jsonl, lr: 1e-2, sequence_length: 64, gradient_accumulation: 1, max_steps: 1}
"""
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
GATE = ("gate", "adapter=adapter", "gate=perplexity", "gate.tasks.responses.data=train.jsonl")
SECONDS = 60
"""Computing time of one command, far above the 2 s of a sound one."""
Spoil = Callable[[Path], object]


def json_of(name: str, **values: Any) -> Spoil:
    """Set keys of a JSON file; ``...`` removes one."""

    def spoil(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        for key, value in values.items():
            content.pop(key, None) if value is ... else content.update({key: value})
        path.write_text(json.dumps(content))

    return spoil


def text_of(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def tensor_of(name: str, change: Callable[[torch.Tensor], torch.Tensor | None], part: str) -> Spoil:
    """Change the first tensor with ``part`` in its name; None removes it."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        first = min(key for key in tensors if part in key)
        tensor = change(tensors.pop(first))
        save_file(tensors if tensor is None else {**tensors, first: tensor}, folder / name, metadata={"format": "pt"})

    return spoil


def pattern(text: str) -> Spoil:
    return json_of("adapter_config.json", target_modules=text)


LOOP, END = "{% for a in range(99999) %}", "{% endfor %}"
CONFIG: dict[str, list[Any]] = {
    "model_type": [..., "evil", "mamba", [], 5],
    "architectures": [[], ["EvilForCausalLM"], "x", None],
    "vocab_size": [..., 0, -1, 10**6, "many"],
    "hidden_size": [0, -1, 1.5, 33, [], None],
    "num_hidden_layers": [0, -1, 1, "x", 10**6],
    "num_attention_heads": [0, 3, None],
    "num_key_value_heads": [0, 3, "x"],
    "hidden_act": ["evil", None, {}],
    "rope_parameters": ["x", {"rope_type": "evil"}, {"rope_type": "yarn"}, []],
    "rms_norm_eps": ["x", None],
    "torch_dtype": ["evil", "os.system"],
    "dtype": ["evil", 5],
    "attn_implementation": ["evil/kernel"],
    "auto_map": [{"AutoModelForCausalLM": "evil.Evil"}],
    "tie_word_embeddings": ["x"],
    "eos_token_id": ["x", -5, 10**9, []],
}
BASES: dict[str, Spoil] = {
    **{
        f"config {key}={value!r:.30}": json_of("config.json", **{key: value})
        for key, values in CONFIG.items()
        for value in values
    },
    **{f"tokenizer {text[:9]!r}": text_of("tokenizer.json", text) for text in ("{}", "[]", "null", "{" * 500, "\0")},
    **{f"tokenizer {key}": json_of("tokenizer.json", **{key: {"type": "Evil"}}) for key in ("model", "decoder")},
    "tokenizer class": json_of("tokenizer_config.json", tokenizer_class="EvilTokenizer"),
    "tokenizer maximum": json_of("tokenizer_config.json", model_max_length="x"),
    "template loops": text_of("chat_template.jinja", f"{LOOP * 2}{END * 2}"),
    "template escapes": text_of("chat_template.jinja", "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}"),
    "generation ends": json_of("generation_config.json", eos_token_id="x"),
    "generation length": json_of("generation_config.json", max_new_tokens="x"),
    "deep JSON": text_of("config.json", "[" * 100_000),
    "weights missing": tensor_of("model.safetensors", lambda tensor: None, "q_proj"),
    "weights of another shape": tensor_of("model.safetensors", lambda tensor: tensor[:3].clone(), "q_proj"),
    "weights of numbers": tensor_of("model.safetensors", lambda tensor: tensor.to(torch.int64), "q_proj"),
    "weights without end": tensor_of("model.safetensors", lambda tensor: tensor / 0, "q_proj"),
    "a scalar": tensor_of("model.safetensors", lambda tensor: torch.tensor(1.0), "q_proj"),
    "no tensors": lambda folder: save_file({}, folder / "model.safetensors"),
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"
ADAPTERS: dict[str, Spoil] = {
    "type": json_of("adapter_config.json", peft_type="EVIL"),
    "no type": json_of("adapter_config.json", peft_type=...),
    "another type": json_of("adapter_config.json", peft_type="PREFIX_TUNING"),
    "rank 0": json_of("adapter_config.json", r=0),
    "rank -1": json_of("adapter_config.json", r=-1),
    "rank of text": json_of("adapter_config.json", r="x"),
    "another rank": json_of("adapter_config.json", r=3),
    "rank without end": json_of("adapter_config.json", r=10**9),
    "alpha": json_of("adapter_config.json", lora_alpha="x"),
    "alpha without end": json_of("adapter_config.json", lora_alpha=1e300),
    "no targets": json_of("adapter_config.json", target_modules=[]),
    "targets that are none": json_of("adapter_config.json", target_modules=["evil"]),
    "targets of numbers": json_of("adapter_config.json", target_modules=[5]),
    "targets are an object": json_of("adapter_config.json", target_modules={"a": 1}),
    "pattern": pattern("("),
    "slow pattern": pattern("(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*evil"),
    "slow rank pattern": json_of("adapter_config.json", rank_pattern={"(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*evil": 4}),
    "megatron": json_of("adapter_config.json", megatron_config={"a": 1}, megatron_core="os"),
    "mapping": json_of("adapter_config.json", auto_mapping={"base_model_class": "X", "parent_library": "os"}),
    "start": json_of("adapter_config.json", init_lora_weights="evil"),
    "bias": json_of("adapter_config.json", bias="evil"),
    "layers": json_of("adapter_config.json", layers_to_transform=[99]),
    "replicated": json_of("adapter_config.json", layer_replication=[[0, 99]]),
    "saved modules": json_of("adapter_config.json", modules_to_save=["evil"]),
    "tokens": json_of("adapter_config.json", trainable_token_indices=[10**9]),
    "a list": text_of("adapter_config.json", "[]"),
    "cut": text_of("adapter_config.json", '{"peft_type":'),
    "weights missing": tensor_of(WEIGHTS, lambda tensor: None, "lora_A"),
    "weights of another shape": tensor_of(WEIGHTS, lambda tensor: tensor[:, :3].clone(), "lora_A"),
    "weights of numbers": tensor_of(WEIGHTS, lambda tensor: tensor.to(torch.int64), "lora_A"),
    "weights without end": tensor_of(WEIGHTS, lambda tensor: tensor / 0, "lora_A"),
    "no tensors": lambda folder: save_file({}, folder / WEIGHTS),
    "no bytes": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "a pipe": lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)),
    "a link": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("/dev/zero")),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("sound")
    write_project(folder, write_base(folder / "base"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("recipe=mine")[0] == 0
        (artifact,) = Path("runs").glob("*/stages/sft/artifact")
        adapter = Path("adapter")
        adapter.mkdir()
        for name in ("adapter_config.json", WEIGHTS):
            shutil.copy(artifact / name, adapter / name)
    return folder


def write_project(folder: Path, base: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine.yaml").write_text(RECIPE)
    (folder / "train.jsonl").write_text((json.dumps(CHAT) + "\n") * 4)
    assert base.is_dir()


def run(*words: str) -> tuple[int, float]:
    started = time.process_time()
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return int(ended.value.code or 0), time.process_time() - started


@pytest.fixture
def project(sound: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(working_folder))
    shutil.copytree(sound / "base", "base")
    shutil.copytree(sound / "adapter", "adapter")
    write_project(working_folder, working_folder / "base")
    return working_folder


def check(folder: Path, capfd: pytest.CaptureFixture[str], *words: str) -> None:
    """Run a command on a hostile folder: it ends well or with a clear error, and nothing else happens."""
    with watched(Path.cwd()) as events:
        code, seconds = run(*words)
    said = capfd.readouterr()
    assert code in (0, 2, 3, 4, 5), said.err
    assert "Traceback" not in said.err + said.out
    assert code in (0, 3, 4) or said.err.startswith("error: ") or "\nerror: " in said.err
    assert seconds < SECONDS
    assert events == []
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("name", BASES)
def test_a_hostile_base(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "template loops":  # it uses the time up; the others would meet so short a limit on a busy machine
        monkeypatch.setattr(texts, "SECONDS", 0.5)
    BASES[name](project / "base")
    check(project / "base", capfd, "recipe=mine")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name.startswith("slow"):
        monkeypatch.setattr(reloading, "PATTERN_SECONDS", 1)
    ADAPTERS[name](project / "adapter")
    check(project / "adapter", capfd, *GATE, "model.path=base", "model.dtype=float32")


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replacing(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


GROWING = {"type": "Sequence", "normalizers": [replacing("a" * 50)] * 5}
TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "nested repetitions": ({"pre_tokenizer": split("(a+)+c")}, "its tokenizer fails at a text of 1,000 characters"),
    "growing texts": ({"normalizer": GROWING}, "the normalizer of its tokenizer makes texts 312,500,000 times as long"),
}
COMMANDS = {"training": ("recipe=mine",), "gate": (*GATE, "model.path=base", "model.dtype=float32")}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_makes_too_much(
    project: Path, capfd: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    parts, what = TOKENIZERS[name]
    json_of("tokenizer.json", **parts)(project / "base")
    assert run(*COMMANDS[command])[0] == 2
    said = capfd.readouterr()
    assert f"error: {project / 'base'}: {what}" in said.err
    assert "Traceback" not in said.err + said.out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_that_is_slow_on_every_text(
    project: Path, capfd: pytest.CaptureFixture[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_watch, "SECONDS", 1e-5)
    monkeypatch.setattr(tokenizer_watch, "CHARACTERS", 10**12)
    assert run(*COMMANDS[command])[0] == 2
    assert f"error: {project / 'base'}: its tokenizer took " in capfd.readouterr().err


SUPERVISED = """\
import ctypes, os, signal, sys
from pathlib import Path
from posttrain.cli import answer
from posttrain.host.supervisor import supervise
from posttrain.model import tokenizer_watch
tokenizer_watch.SECONDS = 2.0
def act():
    with tokenizer_watch.TokenizerWatch(Path("/its/folder")).watching(1234):
        {action}
    return 0
sys.exit(supervise(lambda: answer(sys.argv[1:]) if sys.argv[1:] else act()))
"""


def supervised(*words: str, action: str = "pass") -> subprocess.CompletedProcess[str]:
    script = SUPERVISED.format(action=action)
    return warm.run([sys.executable, "-c", script, *words])


def test_a_tokenizer_that_hangs_at_one_text(project: Path) -> None:
    json_of("tokenizer.json", pre_tokenizer=split("Q*Q*(?!.)(?<!Q)"))(project / "base")
    question = {"role": "user", "content": "Q" * 4000}  # takes half an hour, in compiled code
    Path("train.jsonl").write_text(json.dumps({"messages": [question, CHAT["messages"][1]]}) + "\n")
    done = supervised(*COMMANDS["gate"])
    assert done.returncode == 2, done.stderr
    hung = f"error: {project / 'base'}: its tokenizer hung and had to be ended after 2.4"
    assert hung in done.stderr
    assert "a text of 4,0" in done.stderr


@pytest.mark.parametrize(
    ("action", "fate"),
    [
        ("ctypes.PyDLL(None).sleep(600)", "hung and had to be ended after 2.1234 s without a sign of life"),
        ("os.abort()", "took the process down: SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "took the process down: SIGKILL"),
    ],
)
def test_a_tokenizer_that_takes_the_process_down(action: str, fate: str) -> None:
    done = supervised(action=action)
    assert done.returncode == 2
    assert f"error: /its/folder: its tokenizer {fate}, at a text of 1,234 characters or tokens" in done.stderr


def test_the_sound_adapter_is_judged(project: Path) -> None:
    assert run(*GATE, "model.path=base", "model.dtype=float32")[0] in (0, 3, 4)
