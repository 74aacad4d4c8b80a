"""Direct preference optimisation: this project beside TRL's DPOTrainer, on the same pairs, model, adapter and steps.

    python benchmarks/preference.py --model DIR --data pairs.jsonl

Each contender trains in a process of its own, one after another. Both go on with the same adapter, in the same number
format of the weights. Times run from the beginning of the reference's first forward pass to the end of the last step.
The memory of activations is the peak of the process (of the device on CUDA) over what it held at that beginning.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import machine

CONTENDERS = ("posttrain", "trl", "trl precomputed")
RANK, ALPHA, RATE, BETA = 16, 32, 5e-6, 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training that every contender runs."""

    model: str
    data: str
    adapter: str
    pairs: int
    batch: int
    sequence_length: int
    dtype: str
    gradient_checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one contender."""

    contender: str
    seconds: float
    cpu_seconds: float
    """Seconds on processors, a measure that survives other work on the machine."""
    pairs: int
    activation_bytes: int
    losses: Sequence[float]
    """Loss of each step."""


def main() -> None:
    """Run the comparison given on the command line, or one contender of it."""
    arguments = _arguments()
    if arguments.contender:
        job = Job(**json.loads(arguments.job))
        result = _posttrain(job) if arguments.contender == "posttrain" else _trl(job, arguments.contender)
        print(json.dumps(asdict(result)))
        return
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=arguments.model, data=arguments.data, adapter=folder, pairs=arguments.pairs, batch=arguments.batch,
            sequence_length=arguments.sequence_length, dtype=arguments.dtype,
            gradient_checkpointing=arguments.gradient_checkpointing,
        )  # fmt: skip
        _write_adapter(job)
        report = _report(job, [_in_process(contender, job) for contender in arguments.contenders.split(",")])
    print(json.dumps(report["job"]), *_table(report), sep="\n")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"preference-{report['device'].split()[0].lower()}-{job.dtype}-{job.batch}.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a chat model")
    parser.add_argument("--data", required=True, help="preferences in any shape that stages read")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="pairs in a forward pass, and in a step")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"), help="of the stored weights")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- The comparison ---------------------------------------------------------------------------------------------------


def _write_adapter(job: Job) -> None:
    """Write the adapter that all contenders go on with; its random B makes it one that does something."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32), settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    adapted.save_pretrained(job.adapter)


def _in_process(contender: str, job: Job) -> Result:
    command = [sys.executable, __file__, "--model", job.model, "--data", job.data]
    command += ["--contender", contender, "--job", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    result = Result(**json.loads(done.stdout.strip().splitlines()[-1]))
    print(f"  {contender:<16}{result.seconds:8.1f} s, {result.cpu_seconds:8.1f} s of processors", flush=True)
    return result


def _report(job: Job, results: Sequence[Result]) -> dict[str, Any]:
    described = asdict(job) | {"model": Path(job.model).name, "data": Path(job.data).name, "adapter": f"r {RANK}"}
    rows = [asdict(result) | {"pairs_per_second": result.pairs / result.seconds} for result in results]
    return {**machine.described(), "job": described, "results": rows}


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['device']}, {report['threads']} threads"
    yield f"{'':<17}{'pairs/s':>9}{'CPU s':>9}{'activations GB':>16}{'first loss':>12}{'last loss':>11}"
    for row in report["results"]:
        yield (
            f"{row['contender']:<17}{row['pairs_per_second']:>9.3f}{row['cpu_seconds']:>9.1f}"
            f"{row['activation_bytes'] / 1e9:>16.2f}{row['losses'][0]:>12.6f}{row['losses'][-1]:>11.6f}"
        )
    ours, *peers = report["results"]
    for peer in peers:
        faster = ours["pairs_per_second"] / peer["pairs_per_second"]
        processors = peer["cpu_seconds"] / ours["cpu_seconds"]
        memory = ours["activation_bytes"] / peer["activation_bytes"]
        yield f"beside {peer['contender']}: pairs/s {faster:.2f}, by processors {processors:.2f}, memory {memory:.2f}"


# --- The contenders ---------------------------------------------------------------------------------------------------


class Meter:
    """Times and memory from the first forward pass to the last step; a stage's progress, too."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.held: int | None = None
        self.losses: list[float] = []

    def begin(self) -> None:
        """Begin, once."""
        if self.held is None:
            self.held = _reset_peak()
            self._begun = time.perf_counter(), time.process_time()

    def end(self, loss: float) -> None:
        """Note the end of a step so far."""
        self.seconds = time.perf_counter() - self._begun[0]
        self.cpu_seconds = time.process_time() - self._begun[1]
        self.losses.append(loss)

    def result(self, contender: str, pairs: int) -> Result:
        """Return all of it."""
        return Result(
            contender=contender, seconds=self.seconds, cpu_seconds=self.cpu_seconds, pairs=pairs,
            activation_bytes=_peak() - (self.held or 0), losses=self.losses,
        )  # fmt: skip

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Begin, where nothing was computed before."""
        self.begin()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the end of a step."""
        self.end(metrics["loss"])

    def part(self, done: int, total: int, what: str) -> None:
        """Ignore the parts of a step."""

    def note(self, text: str) -> None:
        """Begin at the note that comes right before the reference's first forward pass."""
        print(text, file=sys.stderr)
        if text.startswith("prompts: "):
            self.begin()


def _reset_peak() -> int:
    """Return the memory in use, and begin to watch its peak anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _records(job: Job) -> list[Any]:
    from posttrain.config.schema import Source
    from posttrain.data.reading import read_source

    return list(read_source(Source(path=job.data, limit=job.pairs), "preferences"))


def _posttrain(job: Job) -> Result:
    from posttrain import environment

    environment.prepare()
    from posttrain_preference.config import DPOSettings
    from posttrain_preference.stage import run

    from posttrain.config.schema import ModelConfig
    from posttrain.context import StageContext
    from posttrain.model.base import resolve_base

    parent = replace(resolve_base(ModelConfig(path=job.model)), name="sft", adapter=Path(job.adapter))
    records = _records(job)
    config = DPOSettings(
        kind="dpo", lr=RATE, beta=BETA, per_device_batch_size=job.batch, gradient_accumulation=1,
        sequence_length=job.sequence_length, gradient_checkpointing=job.gradient_checkpointing,
        checkpoint_steps=10**9,
    )  # fmt: skip
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        output.mkdir()
        run(StageContext(
            name="dpo", config=config, parent=parent, records=records, seed=0, dtype=job.dtype, progress=meter,
            stop_requested=lambda: False, checkpoints=Path(folder, "checkpoints"), output=output,
        ))  # fmt: skip
    return meter.result("posttrain", len(records))


def _trl(job: Job, contender: str) -> Result:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": list(record.prompt), "chosen": list(record.chosen), "rejected": list(record.rejected)}
        for record in _records(job)
    ]
    meter, cuda = Meter(), torch.cuda.is_available()

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
            if "loss" in logs:
                meter.end(float(logs["loss"]))

    base = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), device_map={"": 0} if cuda else None
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, learning_rate=RATE, beta=BETA, num_train_epochs=1, max_length=job.sequence_length,
            per_device_train_batch_size=job.batch, gradient_accumulation_steps=1, use_cpu=not cuda,
            bf16=job.dtype == "bfloat16", gradient_checkpointing=job.gradient_checkpointing, report_to=[],
            logging_steps=1, save_strategy="no", disable_tqdm=True,
            precompute_ref_log_probs=contender == "trl precomputed",
        )  # fmt: skip
        trainer = DPOTrainer(
            model=PeftModel.from_pretrained(base, job.adapter, is_trainable=True), args=settings,
            train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(job.model),
        )  # fmt: skip
        if contender == "trl precomputed":
            meter.begin()  # its reference is computed when training asks for the first batch
        trainer.add_callback(Stopwatch())
        trainer.train()
    return meter.result(contender, len(trainer.train_dataset))


if __name__ == "__main__":
    main()
