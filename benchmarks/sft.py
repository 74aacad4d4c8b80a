"""Supervised fine-tuning: this project beside TRL's SFTTrainer, on the same rows, model, adapter and steps.

    python benchmarks/sft.py --model DIR --data train.jsonl            # rows with question and answer
    python benchmarks/sft.py --model 8b --data train.jsonl --variants lora,qlora    # random weights, on a CUDA GPU

Each contender trains in a process of its own, one after another, so that its peak memory is its own. Times run from the
first step to the end of the last. The matrix rate is measured before all and after them, in products of the shapes
of the model's layers, in bfloat16 and in float32; the share is of the fastest, and counts 4 N operations per token
for adapters, 6 N for full fine-tuning, where N is the number of parameters that multiply (without the input embedding).
Tokens are those of the documents: a beginning that this loop computes once for several of them counts in each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comparison
import machine
from comparison import Meter, Result
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


def main() -> None:
    """Run the comparison given on the command line."""
    arguments = _arguments()
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
    return parser.parse_args()


# --- The comparison ---------------------------------------------------------------------------------------------------


def _compare(job: Job, repeats: int, output: Path | None) -> None:
    before = _rates(job)
    best: dict[str, Result] = {}
    for _ in range(repeats):
        for contender in CONTENDERS:
            result = comparison.measured(__file__, contender, job)
            if contender not in best or result.seconds < best[contender].seconds:
                best[contender] = result
    after = _rates(job)  # the speed of a machine changes
    report = _report(job, list(best.values()), {dtype: max(before[dtype], after[dtype]) for dtype in DTYPES})
    print(json.dumps(report["job"]), *_table(report), sep="\n")
    comparison.write_report(report, output, f"sft-{job.variant}-{job.dtype}")


def _rates(job: Job) -> dict[str, float]:
    return {dtype: machine.matrix_rate(shapes(job.model), job.sequence_length, dtype) for dtype in DTYPES}


def _report(job: Job, results: Sequence[Result], rates: Mapping[str, float]) -> dict[str, Any]:
    operations = (6 if job.variant == "full" else 4) * multiplying_parameters(job.model)
    rows = []
    for result in results:
        per_second = {name: count / result.seconds for name, count in result.counts.items()}
        share = operations * per_second["tokens"] / max(rates.values()) / 1e9
        speeds = {f"{name}_per_second": round(per_second[name], 1) for name in ("tokens", "trained_tokens")}
        rows.append(asdict(result) | speeds | {"matrix_share": round(share, 3)})
    gflops = {dtype: round(rate, 1) for dtype, rate in rates.items()}
    return comparison.report_of(job, matrix_gflops=gflops, results=rows)


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in report["matrix_gflops"].items())
    yield f"{report['device']}, {report['threads']} threads, matrix rates in GFLOP/s: {rates}"
    yield f"{'':<13}{'tokens/s':>10}{'trained/s':>11}{'of rate':>9}{'CPU s':>9}{'peak GB':>9}{'loss':>9}"
    for row in report["results"]:
        yield (
            f"{row['contender']:<13}{row['tokens_per_second']:>10.1f}{row['trained_tokens_per_second']:>11.1f}"
            f"{row['matrix_share']:>9.1%}{row['cpu_seconds']:>9.1f}{row['peak_bytes'] / 1e9:>9.2f}"
            f"{row['losses'][-1]:>9.4f}"
        )
    ours, *peers = report["results"]
    better = max(peer["trained_tokens_per_second"] for peer in peers)
    spent = min(peer["cpu_seconds"] / peer["counts"]["trained_tokens"] for peer in peers)
    padded = next(peer for peer in peers if peer["contender"] == "trl padded")
    yield f"ratio to the better of TRL   {ours['trained_tokens_per_second'] / better:.2f}"
    yield f"the same by processor time  {spent * ours['counts']['trained_tokens'] / ours['cpu_seconds']:.2f}"
    yield f"peak memory to TRL's padded  {ours['peak_bytes'] / padded['peak_bytes']:.2f}"


# --- The contenders ---------------------------------------------------------------------------------------------------


def _contend(contender: str, job: Job) -> Result:
    if contender == "posttrain":
        return _posttrain(job)
    return _trl(job, packed=contender == "trl packed")


def questions(data: str, count: int) -> list[dict[str, str]]:
    """Return the first rows of a JSONL file with question and answer."""
    with Path(data).open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def conversations(data: str, count: int) -> list[Any]:
    """Return them as this project's records."""
    from posttrain.data.records import Conversation

    return [
        Conversation(messages=({"role": "user", "content": row["question"]},
                               {"role": "assistant", "content": row["answer"]}), where=str(number))
        for number, row in enumerate(questions(data, count))
    ]  # fmt: skip


def _posttrain(job: Job) -> Result:
    from posttrain import environment

    environment.prepare()
    from posttrain.config.schema import LoraSettings, Method, ModelConfig
    from posttrain.context import StageContext
    from posttrain.model.base import resolve_base
    from posttrain.model.loading import load_tokenizer
    from posttrain.sft.config import SFTConfig
    from posttrain.sft.stage import run
    from posttrain.tokens.chat import ChatRenderer
    from posttrain.tokens.packing import pack

    source = resolve_base(ModelConfig(path=job.model))
    records = conversations(job.data, job.rows)
    renderer = ChatRenderer(load_tokenizer(source))
    rows = pack([renderer.conversation(record) for record in records], job.sequence_length).counts.rows
    config = SFTConfig(
        data=None, method=Method[job.variant], lr=RATE, epochs=1, lora=LoraSettings(r=RANK, alpha=ALPHA, rslora=False),
        sequence_length=job.sequence_length, gradient_accumulation=-(-rows // job.steps),
        gradient_checkpointing=job.gradient_checkpointing, checkpoint_steps=10**9,
    )  # fmt: skip
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        output.mkdir()
        run(StageContext(
            name="sft", config=config, parent=source, records=records, seed=0, dtype=job.dtype, progress=meter,
            stop_requested=lambda: False, checkpoints=Path(folder, "checkpoints"), output=output,
        ))  # fmt: skip
    counted = {name: int(sum(step[name] for step in meter.steps)) for name in ("tokens", "trained_tokens")}
    return meter.result("posttrain", steps=len(meter.steps), **counted)


def _trl(job: Job, *, packed: bool) -> Result:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": [{"role": "user", "content": row["question"]}],
         "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in questions(job.data, job.rows)
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
        meter = Meter()
        trainer.add_callback(meter.callback())
        trainer.train()
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    counts = {"steps": trainer.state.global_step, "tokens": tokens, "trained_tokens": _trained(trainer)}
    return meter.result("trl packed" if packed else "trl padded", **counts)


def _trained(trainer: Any) -> int:
    """Count the tokens to predict in TRL's own batches."""
    total = 0
    for batch in trainer.get_train_dataloader():
        total += int((batch["labels"][..., 1:] != -100).sum())
    return total


if __name__ == "__main__":
    comparison.main(Job, _contend, main)
