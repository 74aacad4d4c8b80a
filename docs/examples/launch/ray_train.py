"""The processes of a stage as workers of Ray Train: a launcher for ``launch=own``, on one machine or a Ray cluster.

pip install 'ray[train]'
export POSTTRAIN_LAUNCHER="python ray_train.py"
posttrain recipe=mine launch=own launch.processes=8
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from posttrain.launch.worker import main


def work(settings: dict[str, Any]) -> None:
    """Be one of the processes; the command reads what it leaves beside the job."""
    if code := main([settings["job"]]):
        raise RuntimeError(f"the stage ended with {code}")


if __name__ == "__main__":
    job = Path(sys.argv[1])
    given = json.loads(job.read_text(encoding="utf-8"))
    gpu = torch.cuda.is_available()
    TorchTrainer(
        work,
        train_loop_config={"job": str(job)},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=given["silence_seconds"]),
        scaling_config=ScalingConfig(num_workers=given["world"], use_gpu=gpu),
        run_config=RunConfig(storage_path=str(job.parent / "launch"), name="ray"),
    ).fit()
