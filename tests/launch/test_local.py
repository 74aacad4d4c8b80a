"""The whole command with two processes of torchrun: what one process began they finish, as one would have."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from posttrain.artifact import verify
from posttrain.config.compose import compose
from posttrain.errors import Interrupted
from posttrain.hookspecs import hookimpl
from posttrain.host.plugins import Host
from posttrain.pipeline import run
from posttrain.plan import make_plan
from posttrain.run.display import Display
from tests.support.tiny import write_base

RECIPE = """\
defaults:
  - /stage@sft: sft
  - /gate@sft.gate: none
  - _self_
model: {path: base, dtype: float32}
sft:
  data: train.jsonl
  lr: 1e-3
  epochs: 100
  max_steps: 8
  checkpoint_steps: 2
  sequence_length: 64
  gradient_accumulation: 2
"""
TWO = ("launch=local", "launch.processes=2", "engine=ddp")


class Stop:
    """A plugin that stops the run at step 5."""

    @hookimpl
    def step_logged(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if step == 5:
            raise Interrupted("stopped by the test")


def train(host: Host, root: str, *words: str) -> str:
    """Run the recipe; return what was shown."""
    shown = io.StringIO()
    plan = make_plan(compose(host, ["recipe=mine", f"output_root={root}", *words]), host)
    run(plan, host, Display(Console(file=shown, width=500)))
    return shown.getvalue()


def adapter(root: str) -> dict[str, torch.Tensor]:
    (path,) = Path(root).glob("*/stages/sft/artifact/adapter_model.safetensors")
    verify(path.parent)
    return load_file(path)


@pytest.mark.long
def test_two_processes_finish_what_one_began_as_one_would_have(
    host: Host, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_base(working_folder / "base")
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text(RECIPE)
    rows = [{"prompt": f"question {number}", "completion": "yes " * (number % 5 + 1)} for number in range(12)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(host, "one")
    stop = Stop()
    host.manager.register(stop)
    try:
        with pytest.raises(Interrupted):
            train(host, "two")
    finally:
        host.manager.unregister(stop)
    assert "resume after step 4 of 8" in train(host, "two", *TWO)
    (folder,) = Path("two").glob("*/stages/sft")
    assert not list(folder.glob("launch/*")) + list(folder.glob("job.json"))
    logged = [json.loads(line)["step"] for line in (folder.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, 9))
    assert next(Path("one").glob("*/run.json")).parent.name == folder.parents[1].name
    found, expected = adapter("two"), adapter("one")
    apart = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    assert apart <= 1e-8 * sum(float(each.double().square().sum()) for each in expected.values())
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(working_folder) not in shown
