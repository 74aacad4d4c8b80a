"""Supervised fine-tuning: this project beside TRL's SFTTrainer, on the same rows, model, adapter and steps.

    python benchmarks/sft.py --model DIR --data train.jsonl            # rows with question and answer
    python benchmarks/sft.py --model 8b --data train.jsonl --variants lora,qlora    # random weights, on a CUDA GPU

Each contender trains in a process of its own, one after another, so that its peak memory is its own. Times run from the
first step to the end of the last. The matrix rate is measured just before, in products of the shapes
of the model's layers, in bfloat16 and in float32; the share is of the faster one, and counts 4 N operations per token
for adapters, 6 N for full fine-tuning, where N is the number of parameters that multiply (without the input embedding).
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine
from models import multiplying_parameters, random_llama, shapes

DTYPES = ("bfloat16", "float32")
CONTENDERS = ("posttrain", "trl padded", "trl packed")
RANK, ALPHA, RATE = 16, 32, 2e-4


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training that every contender of one comparison runs."""

    model: str
    data: str
    rows: int
    sequence_length: int
    steps: int
    dtype: str
    variant: str
    gradient_checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one contender."""

    contender: str
    seconds: float
    cpu_seconds: float
    """Seconds on processors, a measure that survives other work on the machine."""
    steps: int
    tokens: int
    trained_tokens: int
    peak_bytes: int
    """Peak memory: of the device on CUDA, of the process on a CPU."""
    loss: float
    """Loss of the last step."""


def main() -> None:
    """Run the comparison given on the command line, or one contender of it."""
    arguments = _arguments()
    if arguments.contender:
        print(json.dumps(asdict(_contend(arguments.contender, Job(**json.loads(arguments.job))))))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = random_llama(Path(folder)) if arguments.model == "8b" else arguments.model
        for variant in arguments.variants.split(","):
            job = Job(
                model=model, data=arguments.data, rows=arguments.rows, sequence_length=arguments.sequence_length,
                steps=arguments.steps, dtype=arguments.dtype, variant=variant,
                gradient_checkpointing=arguments.gradient_checkpointing,
            )  # fmt: skip
            _compare(job, arguments.repeats, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a model, or 8b for a Llama with random weights")
    parser.add_argument("--data", required=True, help="JSONL with question and answer")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in which the rows are seen once")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the stored weights")
    parser.add_argument("--variants", default="lora", help="of lora, full, qlora, separated by commas")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="rounds of all contenders; the fastest of each counts")
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- The comparison ---------------------------------------------------------------------------------------------------


def _compare(job: Job, repeats: int, output: Path | None) -> None:
    rates = {dtype: machine.matrix_rate(shapes(job.model), job.sequence_length, dtype) for dtype in DTYPES}
    best: dict[str, Result] = {}
    for _ in range(repeats):
        for contender in CONTENDERS:
            result = _in_process(contender, job)
            times = f"{result.seconds:8.1f} s, {result.cpu_seconds:8.1f} s of processors"
            print(f"  {contender:<12}{times}   loss {result.loss:.4f}", flush=True)
            if contender not in best or result.seconds < best[contender].seconds:
                best[contender] = result
    report = _report(job, list(best.values()), rates)
    print(json.dumps(report["job"]), *_table(report), sep="\n")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        name = f"sft-{report['device'].split()[0].lower()}-{job.variant}-{job.dtype}.json"
        (output / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _in_process(contender: str, job: Job) -> Result:
    command = [sys.executable, __file__, "--model", job.model, "--data", job.data]
    command += ["--contender", contender, "--job", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return Result(**json.loads(done.stdout.strip().splitlines()[-1]))


def _report(job: Job, results: Sequence[Result], rates: Mapping[str, float]) -> dict[str, Any]:
    parameters = multiplying_parameters(job.model)
    operations = (6 if job.variant == "full" else 4) * parameters
    described = asdict(job) | {"model": Path(job.model).name, "data": Path(job.data).name}
    return {
        **machine.described(),
        "job": described,
        "matrix_gflops": {dtype: round(rate, 1) for dtype, rate in rates.items()},
        "results": [
            asdict(result)
            | {
                "tokens_per_second": round(result.tokens / result.seconds, 1),
                "trained_tokens_per_second": round(result.trained_tokens / result.seconds, 1),
                "matrix_share": round(operations * result.tokens / result.seconds / max(rates.values()) / 1e9, 3),
            }
            for result in results
        ],
    }


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in report["matrix_gflops"].items())
    yield f"{report['device']}, {report['threads']} threads, matrix rates in GFLOP/s: {rates}"
    yield f"{'':<13}{'tokens/s':>10}{'trained/s':>11}{'of rate':>9}{'CPU s':>9}{'peak GB':>9}{'loss':>9}"
    for row in report["results"]:
        yield (
            f"{row['contender']:<13}{row['tokens_per_second']:>10.1f}{row['trained_tokens_per_second']:>11.1f}"
            f"{row['matrix_share']:>9.1%}{row['cpu_seconds']:>9.1f}{row['peak_bytes'] / 1e9:>9.2f}{row['loss']:>9.4f}"
        )
    ours, *peers = report["results"]
    better = max(peer["trained_tokens_per_second"] for peer in peers)
    padded = next(peer for peer in peers if peer["contender"] == "trl padded")
    yield f"ratio to the better of TRL   {ours['trained_tokens_per_second'] / better:.2f}"
    yield f"peak memory to TRL's padded  {ours['peak_bytes'] / padded['peak_bytes']:.2f}"


# --- The contenders ---------------------------------------------------------------------------------------------------


def _contend(contender: str, job: Job) -> Result:
    if contender == "posttrain":
        return _posttrain(job)
    return _trl(job, packed=contender == "trl packed")


def _conversations(job: Job) -> list[dict[str, str]]:
    with Path(job.data).open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(job.rows), strict=False)]


class Clock:
    """A stage's progress that keeps times and metrics."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.steps: list[Mapping[str, float]] = []

    def start(self, total_steps: int, done_steps: int = 0, device_flops: float | None = None) -> None:
        """Note the start of the training."""
        self._begun = time.perf_counter(), time.process_time()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the end of a step."""
        self.seconds = time.perf_counter() - self._begun[0]
        self.cpu_seconds = time.process_time() - self._begun[1]
        self.steps.append(dict(metrics))

    def part(self, done: int, total: int, what: str) -> None:
        """Ignore the parts of a step."""

    def note(self, text: str) -> None:
        """Show a line."""
        print(text, file=sys.stderr)


def _posttrain(job: Job) -> Result:
    from posttrain import environment

    environment.prepare()
    from posttrain.config.schema import LoraSettings, Method, ModelConfig
    from posttrain.context import StageContext
    from posttrain.data.records import Conversation
    from posttrain.model.base import resolve_base
    from posttrain.model.loading import load_tokenizer
    from posttrain.sft.config import SFTConfig
    from posttrain.sft.stage import run
    from posttrain.tokens.chat import ChatRenderer
    from posttrain.tokens.packing import pack

    source = resolve_base(ModelConfig(path=job.model))
    records = [
        Conversation(messages=({"role": "user", "content": row["question"]},
                               {"role": "assistant", "content": row["answer"]}), where=str(number))
        for number, row in enumerate(_conversations(job))
    ]  # fmt: skip
    renderer = ChatRenderer(load_tokenizer(source))
    rows = pack([renderer.conversation(record) for record in records], job.sequence_length).counts.rows
    config = SFTConfig(
        data=None, method=Method[job.variant], lr=RATE, epochs=1, lora=LoraSettings(r=RANK, alpha=ALPHA, rslora=False),
        sequence_length=job.sequence_length, gradient_accumulation=-(-rows // job.steps),
        gradient_checkpointing=job.gradient_checkpointing, checkpoint_steps=10**9,
    )  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        output.mkdir()
        run(StageContext(
            name="sft", config=config, parent=source, records=records, seed=0, dtype=job.dtype, progress=clock,
            stop_requested=lambda: False, checkpoints=Path(folder, "checkpoints"), output=output,
        ))  # fmt: skip
    return Result(
        contender="posttrain", seconds=clock.seconds, cpu_seconds=clock.cpu_seconds, steps=len(clock.steps),
        tokens=int(sum(step["tokens"] for step in clock.steps)),
        trained_tokens=int(sum(step["trained_tokens"] for step in clock.steps)),
        peak_bytes=machine.peak_bytes(), loss=clock.steps[-1]["loss"],
    )  # fmt: skip


def _trl(job: Job, *, packed: bool) -> Result:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": [{"role": "user", "content": row["question"]}],
         "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in _conversations(job)
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    quantization = None
    if job.variant == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), quantization_config=quantization,
        device_map={"": 0} if cuda else None,
    )  # fmt: skip
    batch = 1 if packed else 8  # rows of the sequence length; transformers' default
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, learning_rate=RATE, num_train_epochs=1, max_length=job.sequence_length,
            per_device_train_batch_size=batch, gradient_accumulation_steps=1, packing=packed, use_cpu=not cuda,
            bf16=job.dtype == "bfloat16", gradient_checkpointing=job.gradient_checkpointing, report_to=[],
            logging_steps=1, save_strategy="no", disable_tqdm=True, dataset_num_proc=None,
        )  # fmt: skip
        peft = None if job.variant == "full" else LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=peft,
        )  # fmt: skip
        batches = -(-len(trainer.train_dataset) // batch)
        trainer.args.gradient_accumulation_steps = -(-batches // job.steps)
        clock = _callback()
        trainer.add_callback(clock)
        trainer.train()
    dataset = trainer.train_dataset
    tokens = sum(len(ids) for ids in dataset["input_ids"])
    return Result(
        contender="trl packed" if packed else "trl padded", seconds=clock.seconds, cpu_seconds=clock.cpu_seconds,
        steps=trainer.state.global_step, tokens=tokens, trained_tokens=_trained(trainer),
        peak_bytes=machine.peak_bytes(),
        loss=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
    )  # fmt: skip


def _trained(trainer: Any) -> int:
    """Count the tokens to predict in TRL's own batches."""
    total = 0
    for batch in trainer.get_train_dataloader():
        total += int((batch["labels"][..., 1:] != -100).sum())
    return total


def _callback() -> Any:
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        seconds = cpu_seconds = 0.0
        begun: tuple[float, float] | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begun = self.begun or (time.perf_counter(), time.process_time())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = time.perf_counter() - self.begun[0]
            self.cpu_seconds = time.process_time() - self.begun[1]

    return Stopwatch()


if __name__ == "__main__":
    main()
