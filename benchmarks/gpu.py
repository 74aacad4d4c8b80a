"""Measures on a GPU: kernels, memory and speed of SFT and DPO, and gates. One command.

    python benchmarks/gpu.py --output results.json      # one GPU of 80 GB or more; else fewer layers, and said
    python benchmarks/gpu.py --small                     # tiny sizes, on the CPU too: shows that it runs

Every part runs in a process of its own, so that an error, a library that is not installed or a full memory loses that
part alone: its text is then in the place of its figures. Models have random weights, made on the device. Beside each
peak of memory stands what ``posttrain plan`` predicts; ``mfu`` is the share of the measured rate that a run shows, too.

Eight minutes on a GPU that multiplies at 400 TFLOP/s: 8B parameters take 4 N = 30 GFLOP a token under an adapter, 45
with the layers that are computed again, so the 65,536 tokens of ``lora`` take 8 s and those of ``qlora`` perhaps 20;
``full`` trains about half of the layers with 6 N, and 8 N in fact, in 6 s. ``dpo`` has 32 pairs of about 1,000 tokens:
5 s here, and 15 s padded, with the reference anew at every step or before. 800 questions of ``gate`` take about 60 s.
Nine processes that import the libraries, most to draw 8 billion numbers, take 25 s each: 360 s in all, of the 470 s
after which a part is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import machine
from comparison import Meter
from kernels import compare_kernels, document_lengths
from models import LLAMA_8B, QUICKSTART, llama, random_causal

LIMIT, SMALL_LIMIT = 470, 3600
"""Seconds of all parts together, on a GPU and with ``--small``, where they do not count."""
TOKENS, STEPS, ROWS = 4096, 4, 4
"""Tokens of a row, optimizer steps and rows of each."""
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
RANK = 16
PAIRS, BATCH = 32, 4
PROMPT, ANSWER = (200, 500), (100, 500)
"""Fewest and most words of a prompt, and of an answer to it."""
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
    if options.output.is_dir():  # found before minutes of a GPU are spent
        parser.error(f"--output {options.output} is a folder: name the file to write")
    end = time.monotonic() + (SMALL_LIMIT if options.small else LIMIT)
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
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **piped) as part:
        try:
            output, errors = part.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return {"error": "no time was left"}
        finally:
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)  # with the contenders that it has started
    if part.returncode:
        return {"error": errors[-2000:] or f"exit code {part.returncode}"}
    figures: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
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
    from posttrain.config.schema import LoraSettings, Method
    from posttrain.cost.memory import training_memory
    from posttrain.engine.evaluation import Evaluation
    from posttrain.engine.loop import Training
    from posttrain.model.loading import new_adapter
    from posttrain.sft.config import SFTConfig

    tokens = 128 if small else TOKENS
    settings, sizes = _fitting(variant, small, tokens)
    model = random_causal(settings, "float32" if variant == "full" else machine.training_dtype_name())
    if variant == "qlora":
        _quantise(model)
    trained: Any = model if variant == "full" else new_adapter(model, LoraSettings(r=RANK, alpha=2 * RANK), 0)
    config = SFTConfig(
        data=None, method=Method[variant], lr=1e-4, epochs=1, max_steps=STEPS, sequence_length=tokens,
        gradient_accumulation=ROWS, checkpoint_steps=10**9,
    )  # fmt: skip
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        Training(
            model=trained, rows=_rows(tokens, settings["vocab_size"]), config=config, seed=0,
            dtype=machine.training_dtype_name(),
            progress=meter, stop_requested=lambda: False, checkpoints=Path(folder),
            evaluation=Evaluation(rows=(), refusals=0, config=config),
        ).run()  # fmt: skip
    architecture, asked = sizes
    return {
        "layers": settings["num_hidden_layers"], "parameters": architecture.total,
        "tokens_per_second": ROWS * tokens * (STEPS - 1) / sum(meter.times[1:]), "mfu": meter.mfu,
        "device_gflops": (meter.device_flops or 0.0) / 1e9, "first_step_seconds": meter.times[0],
        **_memory(machine.peak_bytes(), training_memory(architecture, asked, "single").total),
        "losses": [step["loss"] for step in meter.steps], "notes": meter.notes,
    }  # fmt: skip


def _memory(peak: int, predicted: int) -> dict[str, float]:
    return {"peak_gb": peak / 1e9, "predicted_gb": predicted / 1e9, "prediction": predicted / peak}


def _fitting(variant: str, small: bool, tokens: int, **sizes: int) -> tuple[dict[str, int], tuple[Any, Any]]:
    """Return the settings of a model with as many layers as fit into the device, and the sizes of it and its training.

    ``sizes`` replace those of the model.
    """
    from posttrain.config.schema import Method
    from posttrain.cost.memory import Training, training_memory

    settings: dict[str, int] = dict(SMALL if small else LLAMA_8B) | sizes
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
        model = llama(settings)
    return architecture_of(model.config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()})


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


# --- Preferences ------------------------------------------------------------------------------------------------------


def dpo(small: bool) -> dict[str, Any]:
    """Train an adapter on pairs, packed by this project and padded by TRL, each in a process of its own."""
    from dataclasses import replace

    from posttrain import environment

    environment.prepare()
    from preference import Job, compare

    from posttrain.config.schema import ModelConfig
    from posttrain.cost.memory import training_memory
    from posttrain.model.base import resolve_base
    from posttrain.model.loading import load_tokenizer

    tokenizer = load_tokenizer(resolve_base(ModelConfig(path=str(QUICKSTART))))
    settings, (architecture, asked) = _fitting("lora", small, 4 * BATCH * PROMPT[1], vocab_size=len(tokenizer))
    pairs, shorter = (4, 10) if small else (PAIRS, 1)
    found: dict[str, Any] = {"layers": settings["num_hidden_layers"], "pairs": pairs}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "pairs.jsonl")
        data.write_text("".join(_pairs(tokenizer, pairs, shorter)), encoding="utf-8")
        job = Job(
            model=str(QUICKSTART), data=str(data), pairs=pairs, batch=2 if small else BATCH, sequence_length=2048,
            dtype=machine.training_dtype_name(), gradient_checkpointing=True, sizes=settings,
        )  # fmt: skip
        for contender in ("posttrain", "trl", "trl precomputed"):
            try:
                (result,) = compare(job, [contender])["results"]
            except RuntimeError as error:  # such as TRL that is not installed
                found[contender] = {"error": str(error)[-1000:]}
                continue
            kept = ("pairs_per_second", "seconds", "losses", "mfu")
            found[contender] = {key: result[key] for key in kept} | {"peak_gb": result["peak_bytes"] / 1e9}
            if tokens := result["counts"].get("tokens_of_a_batch"):
                need = training_memory(architecture, replace(asked, tokens=tokens), "single").total
                found[contender] |= _memory(result["peak_bytes"], need)
    ours, theirs = found["posttrain"], found["trl"]
    if "error" not in ours and "error" not in theirs:
        found["ratio"] = ours["pairs_per_second"] / theirs["pairs_per_second"]
    return found


def _pairs(tokenizer: Any, count: int, shorter: int) -> Iterator[str]:
    """Yield lines with pairs of random words, texts ``shorter`` times as short as those of a full run."""
    draws = random.Random(0)
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ") and token[1:].isalpha())

    def text(bounds: tuple[int, int]) -> str:
        return " ".join(draws.choices(words, k=draws.randint(*bounds) // shorter))

    for _ in range(count):
        answers = {name: [{"role": "assistant", "content": text(ANSWER)}] for name in ("chosen", "rejected")}
        yield json.dumps({"prompt": [{"role": "user", "content": text(PROMPT)}], **answers}) + "\n"


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
    settings = dict(SMALL if small else LLAMA_8B) | {"vocab_size": vocabulary}
    model = random_causal(settings, machine.training_dtype_name()).eval()
    machine.forget_peak()
    found: dict[str, Any] = {}
    for name, task in TASKS.items():
        with tempfile.TemporaryDirectory() as folder:
            request = GateRequest(
                stage="sft", gate=GateConfig(batch_size=64), tasks={name: _limited(task, 16 if small else 400)},
                systems={"candidate": source}, dtype=machine.training_dtype_name(), cache=Path(folder, "cache"),
                scorecard=Path(folder, "scorecard.jsonl"),
            )  # fmt: skip
            started = machine.now()
            card = evaluate(request, Silence(), Loading(lambda *_: model, load_tokenizer, machine.torch_device().type))
            seconds = machine.now() - started
        found[name] = {"documents": len(card.rows), "documents_per_second": len(card.rows) / seconds}
    return found | {"peak_gb": machine.peak_bytes() / 1e9}


def _limited(task: Any, documents: int) -> Any:
    from dataclasses import replace

    return replace(task, limit=documents)


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
    "kernels": compare_kernels, "lora": lora, "qlora": qlora, "full": full, "dpo": dpo, "gate": gate,
}  # fmt: skip
"""Every part by its name."""

if __name__ == "__main__":
    main()
