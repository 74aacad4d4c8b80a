"""sft, gate, dpo, gate: this project beside the scripts that a user would write with TRL and the lm_eval command.

    python benchmarks/pipeline.py [--repeats 2] [--output FOLDER]

Both start from nothing on the quickstart's base, take the same records in as many optimizer steps, and score base,
fine-tuned and preferred model on the same documents in batches of the same size. The scripts are in benchmarks/scripts.
The lm_eval command asks all of its tasks with the chat template or all without, so that it runs twice for each model:
once for the questions, once for the documents. Times are wall times, with imports and start of every process, and
both run with idle OpenMP threads asleep, which is this project's default.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import described

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
SCRIPTS = Path(__file__).resolve().parent / "scripts"
BATCH = 64
"""Documents in a batch, as the quickstart's gates have it."""
SFT_STEPS = 115
"""Optimizer steps of the recipe's fine-tuning, whose rows are packed; the script takes as many records in each."""
ASKED = {"--apply_chat_template": ("towns_facts", "towns_sentences"), "": ("towns_documents",)}
"""Tasks by the way in which the lm_eval command asks them."""
METRICS = {"towns_facts": "exact_match", "towns_sentences": "exact_match", "towns_documents": "acc"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process that a user starts."""

    name: str
    seconds: float
    cpu_seconds: float
    """Seconds on processors, a measure that survives other work on the machine."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The time of one contender, and the scores of its models."""

    contender: str
    parts: list[Part]
    scores: dict[str, dict[str, float]]
    """By model (base, sft, dpo), then by task."""

    @property
    def seconds(self) -> float:
        """Seconds from the first command to the end of the last."""
        return sum(part.seconds for part in self.parts)

    @property
    def cpu_seconds(self) -> float:
        """Seconds on processors, of all processes."""
        return sum(part.cpu_seconds for part in self.parts)


def main() -> None:
    """Run both, the given number of times in turn; the fastest of each counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    arguments = parser.parse_args()
    best: dict[str, Outcome] = {}
    for _ in range(arguments.repeats):
        for contend in (posttrain, scripts):
            with tempfile.TemporaryDirectory() as folder:
                outcome = contend(Path(folder))
            print(*_table(outcome), sep="\n", flush=True)
            if outcome.contender not in best or outcome.seconds < best[outcome.contender].seconds:
                best[outcome.contender] = outcome
    ours, theirs = best["posttrain"], best["scripts"]
    ratio, cpu_ratio = theirs.seconds / ours.seconds, theirs.cpu_seconds / ours.cpu_seconds
    print(f"ratio: {ratio:.2f} by the wall, {cpu_ratio:.2f} by processor time")
    if arguments.output is not None:
        report = described() | {
            "repeats": arguments.repeats,
            "ratio": round(ratio, 2),
            "cpu_ratio": round(cpu_ratio, 2),
        }
        report["results"] = [
            {"seconds": round(one.seconds, 1), "cpu_seconds": round(one.cpu_seconds, 1)} | asdict(one)
            for one in (ours, theirs)
        ]
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "pipeline-cpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _table(outcome: Outcome) -> Iterator[str]:
    yield f"{outcome.contender}: {outcome.seconds:.1f} s, {outcome.cpu_seconds:.1f} s of processors"
    for part in outcome.parts:
        yield f"  {part.name:<22}{part.seconds:8.1f} s {part.cpu_seconds:8.1f} s of processors"
    for model, scores in outcome.scores.items():
        yield f"  {model:<22}" + "  ".join(f"{task} {score:.1%}" for task, score in sorted(scores.items()))


# --- The contenders ---------------------------------------------------------------------------------------------------


def posttrain(folder: Path) -> Outcome:
    """Run one command."""
    command = ["-m", "posttrain", "recipe=quickstart", "stages=[sft,dpo]", f"output_root={folder}"]
    part = _timed("posttrain", command, folder)
    (run,) = folder.glob("quickstart-*")
    scores: dict[str, dict[str, float]] = {"base": {}, "sft": {}, "dpo": {}}
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if max(row["step"] for row in steps if row["stage"] == "sft") != SFT_STEPS:
        raise SystemExit(f"the recipe no longer takes {SFT_STEPS} steps: mend SFT_STEPS")
    for stage in ("sft", "dpo"):
        verdict = json.loads((run / "stages" / stage / "verdict.json").read_text(encoding="utf-8"))
        for task in verdict["tasks"]:
            scores["base"][task["task"]] = task["base"]
            scores[stage][task["task"]] = task["candidate"]
            if stage == "dpo":
                scores["sft"][task["task"]] = task["parent"]
    return Outcome(contender="posttrain", parts=[part], scores=scores)


def scripts(folder: Path) -> Outcome:
    """Run two scripts, and the lm_eval command for each of three models."""
    base, data = QUICKSTART / "base", QUICKSTART / "sft.jsonl"
    sft, dpo = _settings("sft"), _settings("dpo")
    rows = -(-sft["epochs"] * len(data.read_text(encoding="utf-8").splitlines()) // SFT_STEPS)
    merged = folder / "sft" / "merged"
    parts = [
        *_lm_eval(folder, "base", f"pretrained={base}"),
        _timed("train sft", [str(SCRIPTS / "trl_sft.py"), str(base), str(data), str(folder / "sft"), str(rows),
                             str(sft["epochs"]), str(sft["sequence_length"]), str(sft["lr"])], folder),
        *_lm_eval(folder, "sft", f"pretrained={base},peft={folder / 'sft' / 'adapter'}"),
        _timed("train dpo", [str(SCRIPTS / "trl_dpo.py"), str(merged), str(QUICKSTART / "dpo.jsonl"),
                             str(folder / "dpo"), str(dpo["per_device_batch_size"]), str(dpo["lr"]), str(dpo["beta"]),
                             str(dpo["sequence_length"])], folder),
        *_lm_eval(folder, "dpo", f"pretrained={merged},peft={folder / 'dpo' / 'adapter'}"),
    ]  # fmt: skip
    return Outcome(
        contender="scripts", parts=parts, scores={name: _scored(folder / name) for name in ("base", "sft", "dpo")}
    )


def _settings(stage: str) -> dict[str, Any]:
    """Return a stage's settings in the recipe."""
    command = [sys.executable, "-m", "posttrain", "plan", "recipe=quickstart", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout)["config"][stage])


def _lm_eval(folder: Path, name: str, model: str) -> Iterator[Part]:
    """Score the questions with the chat template, and the documents without."""
    for flag, tasks in ASKED.items():
        command = ["-m", "lm_eval", "--model", "hf", "--model_args", f"{model},dtype=float32", "--device", "cpu"]
        command += ["--tasks", *(f"{task}.yaml" for task in tasks), "--batch_size", str(BATCH)]
        command += ["--log_samples", "--output_path", str(folder / name / "scores"), *([flag] if flag else [])]
        yield _timed(f"lm_eval {name} {'chat' if flag else 'plain'}", command, folder, cwd=QUICKSTART / "tasks")


def _scored(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for file in (folder / "scores").rglob("results_*.json"):
        for task, values in json.loads(file.read_text(encoding="utf-8"))["results"].items():
            (found[task],) = {value for key, value in values.items() if key.split(",")[0] == METRICS[task]}
    return found


def _timed(name: str, words: Sequence[str], folder: Path, *, cwd: Path | None = None) -> Part:
    environment: Mapping[str, str] = {
        **os.environ, "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_CACHE": str(folder / "datasets"),
    }  # fmt: skip
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd or folder, env=environment, capture_output=True, text=True, check=False
    )
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{name} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Part(name=name, seconds=seconds, cpu_seconds=spent)


if __name__ == "__main__":
    main()
