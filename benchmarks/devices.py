"""Full fine-tuning on several processes beside one: time, and the memory of each process.

    python benchmarks/devices.py --model DIR --data train.jsonl            # rows with question and answer

One process computes with all cores; several share them. Each contender takes the same steps of the same rows. Times
run from the first step to the end of the last. Memory is the peak of a process over what it held with its libraries
loaded, before it read any weight: of the device on CUDA, else of resident pages, those of mapped files included. The
libraries' own part is given beside it, as it does not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import machine
from comparison import Meter, report_of, write_report
from sft import conversations

CONTENDERS = ("single", "ddp", "fsdp", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training that every contender runs."""

    model: str
    data: str
    rows: int
    sequence_length: int
    steps: int
    batch: int
    """Packed rows of a step, of all processes together."""
    dtype: str
    method: str


@dataclass(frozen=True, kw_only=True)
class Own:
    """The result of one process."""

    seconds: float
    cpu_seconds: float
    tokens: int
    """Tokens of all processes."""
    held_bytes: int
    """Memory before any weight was read."""
    peak_bytes: int
    losses: Sequence[float]


class Watch(Meter):
    """A meter that keeps the peak of loading, too."""

    loading_bytes = 0

    def begin(self) -> None:
        """Begin, once."""
        if self.held is None:
            self.loading_bytes = machine.peak_bytes()
        super().begin()


def main() -> None:
    """Run the comparison given on the command line, or one process of it."""
    arguments = _arguments()
    if arguments.contender:
        _work(arguments.contender, Job(**json.loads(arguments.job)), arguments.output)
        return
    job = Job(**{each.name: getattr(arguments, each.name) for each in fields(Job)})
    contenders = arguments.contenders.split(",")
    report = _report(job, {name: _launched(name, job, arguments.processes) for name in contenders})
    print(json.dumps(report["job"]), *_table(report), sep="\n")
    write_report(report, arguments.output, f"devices-{job.method}-{job.dtype}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a model")
    parser.add_argument("--data", required=True, help="JSONL with question and answer")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="packed rows of a step, of all processes together")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the stored weights")
    parser.add_argument("--method", default="full", choices=("full", "lora"))
    parser.add_argument("--processes", type=int, default=2, help="of every contender but single")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- The comparison ---------------------------------------------------------------------------------------------------


def _launched(contender: str, job: Job, processes: int) -> list[Own]:
    """Run a contender; return the result of each process."""
    count = 1 if contender == "single" else processes
    from posttrain.launch.group import HEAP

    threads = max(1, (os.cpu_count() or 1) // count)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, __file__, "--model", job.model, "--data", job.data]
        command += ["--contender", contender, "--job", json.dumps(asdict(job)), "--output", folder]
        tunables = {"GLIBC_TUNABLES": HEAP} if count > 1 else {}  # as launch=local sets them
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | tunables
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
        results = [Own(**json.loads(path.read_text())) for path in sorted(Path(folder).glob("*.json"))]
    print(f"  {contender:<10}{max(each.seconds for each in results):8.1f} s", flush=True)
    return results


def _report(job: Job, results: Mapping[str, Sequence[Own]]) -> dict[str, Any]:
    rows = [
        {
            "engine": name,
            "processes": len(each),
            "seconds": max(result.seconds for result in each),
            "cpu_seconds": sum(result.cpu_seconds for result in each),
            "tokens_per_second": each[0].tokens / max(result.seconds for result in each),
            "held_bytes": max(result.held_bytes for result in each),
            "peak_bytes": max(result.peak_bytes - result.held_bytes for result in each),
            "last_loss": each[0].losses[-1],
        }
        for name, each in results.items()
    ]
    return report_of(job, results=rows)


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['device']}, {os.cpu_count()} cores"
    yield f"{'':<11}{'processes':>10}{'tokens/s':>10}{'CPU s':>8}{'GB a process':>14}{'libraries':>11}{'loss':>10}"
    for row in report["results"]:
        yield (
            f"{row['engine']:<11}{row['processes']:>10}{row['tokens_per_second']:>10.1f}{row['cpu_seconds']:>8.1f}"
            f"{row['peak_bytes'] / 1e9:>14.2f}{row['held_bytes'] / 1e9:>11.2f}{row['last_loss']:>10.6f}"
        )
    one, *several = report["results"]
    for row in several:
        time_share, cpu_share = row["seconds"] / one["seconds"], row["cpu_seconds"] / one["cpu_seconds"]
        memory = row["peak_bytes"] / one["peak_bytes"]
        shares = f"time {time_share:.2f}, processors {cpu_share:.2f}, memory {memory:.2f}"
        yield f"{row['engine']} beside one process: {shares}"


# --- One process ------------------------------------------------------------------------------------------------------


def _work(engine: str, job: Job, output: Path) -> None:
    from posttrain import environment

    environment.prepare()
    from posttrain.config.schema import Method, ModelConfig
    from posttrain.context import StageContext
    from posttrain.engine import processes
    from posttrain.model.base import resolve_base
    from posttrain.sft.config import SFTConfig
    from posttrain.sft.stage import run

    processes.join()
    records = conversations(job.data, job.rows)
    config = SFTConfig(
        data=None, method=Method[job.method], lr=1e-5, max_steps=job.steps, sequence_length=job.sequence_length,
        per_device_batch_size=1, gradient_accumulation=job.batch,
    )  # fmt: skip
    watch = Watch()
    held = machine.forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(output if processes.world() > 1 else folder)
        written = shared / "artifact"
        written.mkdir(exist_ok=True)
        run(StageContext(
            name="sft", config=config, parent=resolve_base(ModelConfig(path=job.model)), records=records,
            seed=0, dtype=job.dtype, progress=watch, stop_requested=lambda: False, checkpoints=shared / "checkpoints",
            output=written, engine=engine,
        ))  # fmt: skip
    result = Own(
        seconds=watch.seconds, cpu_seconds=watch.cpu_seconds, tokens=int(sum(each["tokens"] for each in watch.steps)),
        held_bytes=held, peak_bytes=max(watch.loading_bytes, machine.peak_bytes()),
        losses=[each["loss"] for each in watch.steps],
    )  # fmt: skip
    (output / f"{processes.rank()}.json").write_text(json.dumps(asdict(result)))
    processes.leave()


if __name__ == "__main__":
    main()
