"""Direct preference optimisation: this project beside TRL's DPOTrainer, on the same pairs, model, adapter and steps.

    python benchmarks/preference.py --model DIR --data pairs.jsonl

Each contender trains in a process of its own, one after another. Both go on with the same adapter, in the same number
format of the weights. Times run from the beginning of the reference's first forward pass to the end of the last step.
The memory of activations is the peak of the process (of the device on CUDA) over what it held at that beginning.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comparison
from comparison import Meter, Result
from models import random_causal

CONTENDERS = ("posttrain", "trl", "trl precomputed")
RANK, ALPHA, RATE, BETA = 16, 32, 5e-6, 0.1


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training that every contender runs."""

    model: str
    data: str
    pairs: int
    batch: int
    sequence_length: int
    dtype: str
    gradient_checkpointing: bool
    adapter: str | None = None
    """Folder of the adapter that all go on with; None begins a new one."""
    sizes: Mapping[str, int] | None = None
    """Settings of a Llama with random weights, which takes the place of the model: that gives the tokenizer alone."""


def main() -> None:
    """Run the comparison given on the command line."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model=arguments.model, data=arguments.data, adapter=folder, pairs=arguments.pairs, batch=arguments.batch,
            sequence_length=arguments.sequence_length, dtype=arguments.dtype,
            gradient_checkpointing=arguments.gradient_checkpointing,
        )  # fmt: skip
        _write_adapter(job)
        report = compare(job, arguments.contenders.split(","))
    print(json.dumps(report["job"]), *_table(report), sep="\n")
    comparison.write_report(report, arguments.output, f"preference-{job.dtype}-{job.batch}")


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
    return parser.parse_args()


# --- The comparison ---------------------------------------------------------------------------------------------------


def _write_adapter(job: Job) -> None:
    """Write the adapter that all contenders go on with; its random B makes it one that does something."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32), _new_adapter())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    adapted.save_pretrained(job.adapter)


def compare(job: Job, contenders: Sequence[str]) -> dict[str, Any]:
    """Run ``job`` as every contender and return the report."""
    results = [comparison.measured(__file__, contender, job) for contender in contenders]
    rows = [asdict(result) | {"pairs_per_second": result.counts["pairs"] / result.seconds} for result in results]
    return comparison.report_of(replace(job, adapter=job.adapter and f"r {RANK}"), results=rows)


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


def _contend(contender: str, job: Job) -> Result:
    return _posttrain(job) if contender == "posttrain" else _trl(job, contender)


def _records(job: Job) -> list[Any]:
    from posttrain.config.schema import Source
    from posttrain.data.reading import read_source

    return list(read_source(Source(path=job.data, limit=job.pairs), "preferences"))


def _posttrain(job: Job) -> Result:
    from posttrain import environment

    environment.prepare()
    from posttrain_preference.config import DPOSettings
    from posttrain_preference.stage import run

    from posttrain.config.schema import LoraSettings, ModelConfig
    from posttrain.context import StageContext
    from posttrain.model.base import resolve_base
    from posttrain.model.loading import new_adapter

    class InMemory(StageContext):
        """A stage whose model was never in a file."""

        def policy(self) -> Any:
            """Return the random model with a new adapter."""
            return new_adapter(random_causal(job.sizes or {}, job.dtype), LoraSettings(r=RANK, alpha=ALPHA), 0)

        def save(self, model: Any) -> None:
            """Save nothing."""

    parent = replace(resolve_base(ModelConfig(path=job.model)), name="sft", adapter=job.adapter and Path(job.adapter))
    records = _records(job)
    config = DPOSettings(
        kind="dpo", lr=RATE, beta=BETA, per_device_batch_size=job.batch, gradient_accumulation=1,
        sequence_length=job.sequence_length, gradient_checkpointing=job.gradient_checkpointing,
        checkpoint_steps=10**9,
    )  # fmt: skip
    meter = Meter("prompts: ")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        output.mkdir()
        run((InMemory if job.sizes else StageContext)(
            name="dpo", config=config, parent=parent, records=records, seed=0, dtype=job.dtype, progress=meter,
            stop_requested=lambda: False, checkpoints=Path(folder, "checkpoints"), output=output,
        ))  # fmt: skip
    largest = max(int(step["tokens"]) for step in meter.steps)
    return meter.result("posttrain", pairs=len(records), tokens_of_a_batch=largest)


def _trl(job: Job, contender: str) -> Result:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": list(record.prompt), "chosen": list(record.chosen), "rejected": list(record.rejected)}
        for record in _records(job)
    ]
    meter, cuda = Meter(), torch.cuda.is_available()

    if job.sizes:
        model = random_causal(job.sizes, job.dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.dtype), device_map={"": 0} if cuda else None
        )
    if job.adapter:
        model = PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, learning_rate=RATE, beta=BETA, num_train_epochs=1, max_length=job.sequence_length,
            per_device_train_batch_size=job.batch, gradient_accumulation_steps=1, use_cpu=not cuda,
            bf16=job.dtype == "bfloat16", gradient_checkpointing=job.gradient_checkpointing, report_to=[],
            logging_steps=1, save_strategy="no", disable_tqdm=True,
            precompute_ref_log_probs=contender == "trl precomputed",
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model, args=settings, peft_config=None if job.adapter else _new_adapter(),
            train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(job.model),
        )  # fmt: skip
        if contender == "trl precomputed":
            meter.begin()  # its reference is computed when training asks for the first batch
        trainer.add_callback(meter.callback())
        trainer.train()
    return meter.result(contender, pairs=len(trainer.train_dataset))


def _new_adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    comparison.main(Job, _contend, main)
