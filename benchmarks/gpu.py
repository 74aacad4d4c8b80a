"""Measures on a GPU: kernels, memory and speed of training, and gates. One command.

    python benchmarks/gpu.py --output results.json      # one GPU of 80 GB or more; else fewer layers, and said
    python benchmarks/gpu.py --small                     # tiny sizes, on the CPU too: shows that it runs

Every part runs in a process of its own, so that an error or a full memory loses that part alone: its text is then in
the place of its figures. Models have random weights, made on the device. Beside each peak of memory stands what
``posttrain plan`` predicts. Shares of the matrix rate count 4 N operations per token for adapters and 6 N for full
fine-tuning, where N is the number of parameters that multiply.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine
from kernels import compare_kernels, document_lengths
from models import LLAMA_8B, QUICKSTART

LIMIT = 470
"""Seconds of all parts together."""
TOKENS, STEPS, ROWS = 4096, 4, 4
"""Tokens of a row, optimizer steps and rows of each."""
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
RANK = 16
FULL = 0.85
"""Share of the device's memory that a training may need by prediction; beyond it, the model gets fewer layers."""


def main() -> None:
    """Run every part and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that every part runs")
    parser.add_argument("--parts", default=",".join(PARTS), help="of these, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="the result")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.small)))
        return
    end = time.monotonic() + LIMIT
    report: dict[str, Any] = {**machine.described(), "small": options.small, "parts": {}}
    for name in options.parts.split(","):
        started = time.monotonic()
        found = _in_process(name, small=options.small, seconds=end - started)
        report["parts"][name] = found | {"seconds": round(time.monotonic() - started, 1)}
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"{name:<8} {json.dumps(report['parts'][name])}", flush=True)


def _in_process(name: str, *, small: bool, seconds: float) -> dict[str, Any]:
    """Return the figures of a part, or its error."""
    command = [sys.executable, __file__, "--part", name, *(["--small"] if small else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return {"error": "no time was left"}
    if done.returncode:
        return {"error": done.stderr[-2000:] or f"exit code {done.returncode}"}
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


# --- Training ---------------------------------------------------------------------------------------------------------


def lora(small: bool) -> dict[str, Any]:
    """Train an adapter on 16-bit weights."""
    return _train("lora", small)


def qlora(small: bool) -> dict[str, Any]:
    """Train an adapter on 4-bit weights."""
    return _train("qlora", small)


def full(small: bool) -> dict[str, Any]:
    """Train all weights: as many layers as fit."""
    return _train("full", small)


def _train(variant: str, small: bool) -> dict[str, Any]:
    from posttrain import environment

    environment.prepare()
    import torch

    from posttrain.config.schema import LoraSettings, Method
    from posttrain.cost.memory import training_memory
    from posttrain.engine.evaluation import Evaluation
    from posttrain.engine.loop import Training
    from posttrain.model.loading import new_adapter
    from posttrain.sft.config import SFTConfig

    tokens = 128 if small else TOKENS
    settings, sizes = _fitting(variant, small, tokens)
    model = _random_llama(settings, torch.float32 if variant == "full" else machine.training_dtype())
    if variant == "qlora":
        _quantise(model)
    trained: Any = model if variant == "full" else new_adapter(model, LoraSettings(r=RANK, alpha=2 * RANK), 0)
    config = SFTConfig(
        data=None, method=Method[variant], lr=1e-4, epochs=1, max_steps=STEPS, sequence_length=tokens,
        gradient_accumulation=ROWS, checkpoint_steps=10**9,
    )  # fmt: skip
    clock = _Clock()
    machine.forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        Training(
            model=trained, rows=_rows(tokens, settings["vocab_size"]), config=config, seed=0,
            dtype=machine.training_dtype_name(),
            progress=clock, stop_requested=lambda: False, checkpoints=Path(folder),
            evaluation=Evaluation(rows=(), refusals=0, config=config),
        ).run()  # fmt: skip
    architecture, asked = sizes
    peak, predicted = machine.peak_bytes(), training_memory(architecture, asked, "single").total
    per_second = ROWS * tokens / statistics.median(clock.times[1:])
    operations = (6 if variant == "full" else 4) * (architecture.total - architecture.ends // 2)
    rate = machine.matrix_rate(_shapes(settings), tokens, machine.training_dtype_name())
    return {
        "layers": settings["num_hidden_layers"], "parameters": architecture.total, "tokens_per_second": per_second,
        "matrix_gflops": rate, "matrix_share": operations * per_second / rate / 1e9, "peak_gb": peak / 1e9,
        "predicted_gb": predicted / 1e9, "prediction": predicted / peak, "losses": clock.losses, "notes": clock.notes,
    }  # fmt: skip


def _fitting(variant: str, small: bool, tokens: int) -> tuple[dict[str, int], tuple[Any, Any]]:
    """Return the sizes of the model, with as many layers as fit into the device, for the model and its training."""
    from posttrain.config.schema import Method
    from posttrain.cost.memory import Training, training_memory

    settings: dict[str, int] = dict(SMALL if small else LLAMA_8B)
    asked = Training(
        method=Method[variant], rank=RANK, tokens=tokens, checkpointing=True, loss_chunk=1024,
        compute_bytes=2 if machine.training_dtype_name() == "bfloat16" else 4,
    )  # fmt: skip
    while True:
        architecture = _architecture(settings)
        if small or training_memory(architecture, asked, "single").total <= FULL * machine.device_bytes():
            return settings, (architecture, asked)
        settings["num_hidden_layers"] -= 1


def _architecture(settings: Mapping[str, int]) -> Any:
    import torch

    from posttrain.cost.architecture import architecture_of

    with torch.device("meta"):
        model = _llama(settings)
    return architecture_of(model.config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()})


def _random_llama(settings: Mapping[str, int], dtype: Any) -> Any:
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with machine.torch_device():
            return _llama(settings).to(dtype)
    finally:
        torch.set_default_dtype(torch.float32)


def _llama(settings: Mapping[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False))


def _quantise(model: Any) -> None:
    """Put the layers of ``model`` into 4 bits, as loading with quantisation would."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.model.layers.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                small = Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=machine.training_dtype()
                )
                small.weight = Params4bit(
                    layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                small.support_avx512bf16_for_cpu = False
                setattr(parent, name, small.to(machine.torch_device()))
    model.is_quantized = model.is_loaded_in_4bit = True


class _Clock:
    """A stage's progress that keeps the time of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self.notes: list[str] = []

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Note the start of the training."""
        self._begun = time.perf_counter()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the end of a step."""
        now = time.perf_counter()
        self.times.append(now - self._begun)
        self.losses.append(metrics["loss"])
        self._begun = now

    def part(self, done: int, total: int, what: str) -> None:
        """Ignore the parts of a step."""

    def note(self, text: str) -> None:
        """Keep a line."""
        self.notes.append(text)


# --- Gates ------------------------------------------------------------------------------------------------------------


def gate(small: bool) -> dict[str, Any]:
    """Ask a random model the questions of the quickstart's gates, one task generated and one by likelihood."""
    from posttrain import environment

    environment.prepare()
    from base_gates import TASKS, Silence

    from posttrain.config.schema import GateConfig, ModelConfig
    from posttrain.gate.spec import GateRequest
    from posttrain.model.base import resolve_base
    from posttrain.model.loading import load_tokenizer
    from posttrain.scoring.evaluate import evaluate
    from posttrain.scoring.systems import Loading

    source = resolve_base(ModelConfig(path=str(QUICKSTART)))
    vocabulary = len(load_tokenizer(source))
    model = _random_llama(
        dict(SMALL if small else LLAMA_8B) | {"vocab_size": vocabulary}, machine.training_dtype()
    ).eval()
    found: dict[str, Any] = {}
    for name, task in TASKS.items():
        with tempfile.TemporaryDirectory() as folder:
            request = GateRequest(
                stage="sft", gate=GateConfig(batch_size=64), tasks={name: _limited(task, 16 if small else 400)},
                systems={"candidate": source}, dtype=machine.training_dtype_name(), cache=Path(folder, "cache"),
                scorecard=Path(folder, "scorecard.jsonl"),
            )  # fmt: skip
            started = time.perf_counter()
            card = evaluate(request, Silence(), Loading(lambda *_: model, load_tokenizer, machine.torch_device().type))
            seconds = time.perf_counter() - started
        found[name] = {"documents": len(card.rows), "documents_per_second": len(card.rows) / seconds}
    return found | {"peak_gb": machine.peak_bytes() / 1e9}


def _limited(task: Any, documents: int) -> Any:
    from dataclasses import replace

    return replace(task, limit=documents)


def _shapes(settings: Mapping[str, int]) -> list[tuple[int, int]]:
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    return [(width, width), (inner, width), (width, inner)]


def _rows(tokens: int, vocabulary: int) -> list[Any]:
    """Return packed rows of random tokens, of which the second half of each document is trained."""
    import numpy as np

    from posttrain.tokens.packing import PackedRow

    generator = np.random.default_rng(0)
    lengths = document_lengths(tokens)
    mask = np.concatenate([np.arange(length) >= length // 2 for length in lengths])
    count = STEPS * ROWS
    return [PackedRow(generator.integers(vocabulary, size=tokens), mask, tuple(lengths)) for _ in range(count)]


PARTS: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "kernels": compare_kernels, "lora": lora, "qlora": qlora, "full": full, "gate": gate,
}  # fmt: skip
"""Every part by its name."""

if __name__ == "__main__":
    main()
