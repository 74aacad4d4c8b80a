"""Kills: a small run of three stages, killed at random moments and started again until it is done.

    python benchmarks/kills.py [--kills 1000] [--seed 0] [--recipe quickstart]

One process imports everything and forks a child for every attempt, so that the moments fall into the run and not into
its imports. Each attempt gets SIGKILL after a time drawn between 0 and the time of a run without any; after the last
attempt the adapters have to be those of the undisturbed run, byte for byte, no published stage may have been trained a
second time, and the ledger has to verify. A history that breaks a promise is kept in its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import machine

SMALL = (
    "sft.max_steps=24", "dpo.max_steps=6", "safety.max_steps=6",
    "sft.checkpoint_steps=4", "dpo.checkpoint_steps=2", "safety.checkpoint_steps=2",
    "gate@dpo.gate=none", "gate@safety.gate=none", "sft.gate.on_fail=warn", "sft.gate.on_undecided=warn",
    "sft.gate.tasks.towns_facts.limit=24", "sft.gate.tasks.towns_documents.limit=24", "sft.gate.batch_size=8",
)  # fmt: skip
"""A run with every kind of work in it; its gate scores and decides, and does not stop it."""
ENDED = (0, 3, 4)
"""Exit codes of a run that reached its end."""


@dataclass(kw_only=True)
class History:
    """One run from its first attempt to its end."""

    kills: int = 0
    attempts: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Kill runs until the number of kills is reached; print the result as JSON, and return 1 after any fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="quickstart")
    arguments = parser.parse_args()
    command = [f"recipe={arguments.recipe}", *SMALL]
    _import_everything()
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    clean = work / "clean"
    started = time.monotonic()
    code = _attempt(command, clean, None)
    seconds = time.monotonic() - started
    if code not in ENDED:
        raise SystemExit(f"the undisturbed run ended with {code}: {(clean / 'output.txt').read_text()[-2000:]}")
    wanted, generator = _adapters(clean), random.Random(arguments.seed)
    histories: list[History] = []
    while sum(history.kills for history in histories) < arguments.kills:
        histories.append(_history(command, work / f"history-{len(histories)}", seconds, wanted, generator))
        done = sum(history.kills for history in histories)
        print(f"{done} kills, {len(histories)} runs, faults: {_faults(histories)}", file=sys.stderr)
    result = {
        "machine": machine.described(),
        "seconds_of_a_run": round(seconds, 1),
        "kills": sum(history.kills for history in histories),
        "runs": len(histories),
        "most_kills_of_a_run": max(history.kills for history in histories),
        "faults": _faults(histories),
    }
    print(json.dumps(result, indent=2))
    return 1 if result["faults"] else 0


def _history(command: list[str], folder: Path, seconds: float, wanted: dict[str, bytes], generator: random.Random
             ) -> History:  # fmt: skip
    history, published = History(), dict[str, int]()
    while True:
        code = _attempt(command, folder, generator.uniform(0, seconds))
        history.attempts += 1
        for name, inode in _published(folder).items():
            if published.setdefault(name, inode) != inode:
                history.faults.append(f"{folder}: {name} was published twice")
        if code is None:
            history.kills += 1
            continue
        if code not in ENDED:
            history.faults.append(f"{folder}: exit {code}")
        elif _adapters(folder) != wanted:
            history.faults.append(f"{folder}: other adapters")
        elif _forked(["ledger", "verify"], folder, None) != 0:
            history.faults.append(f"{folder}: the ledger does not verify")
        break
    if not history.faults:
        shutil.rmtree(folder)
    return history


def _attempt(command: list[str], folder: Path, moment: float | None) -> int | None:
    """Run ``command`` in ``folder``; return its exit code, None after a kill at ``moment`` seconds."""
    folder.mkdir(exist_ok=True)
    return _forked(command, folder, moment)


def _forked(command: list[str], folder: Path, moment: float | None) -> int | None:
    child = os.fork()
    if child == 0:
        _run(command, folder)
    end = None if moment is None else time.monotonic() + moment
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)


def _run(command: list[str], folder: Path) -> None:
    """Be the command, in a process of its own, and end with its exit code."""
    from posttrain import cli

    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 70
    try:
        cli.main(command)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def _published(folder: Path) -> dict[str, int]:
    """Return the inode of every manifest in a stage's ``artifact``, by its path."""
    found = folder.glob("runs/*/stages/*/artifact/manifest.json")
    return {str(path.relative_to(folder)): path.stat().st_ino for path in found}


def _adapters(folder: Path) -> dict[str, bytes]:
    found = folder.glob("runs/*/stages/*/artifact/adapter_model.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _faults(histories: list[History]) -> list[str]:
    return [fault for history in histories for fault in history.faults]


def _import_everything() -> None:
    """Import in this process what every child needs, with one thread: a pool of threads does not survive a fork."""
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import posttrain_preference.objectives
    import posttrain_preference.stage  # noqa: F401
    import transformers  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
