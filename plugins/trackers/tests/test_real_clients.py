"""Every tracker with its real client, in one process of their own: some clients change others at their import."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from posttrain_trackers import TRACKERS

from tests.support.fakes import write_project

ROOT = Path(__file__).resolve().parents[3]
LOSS, LIFT = "sft/loss", "dpo/lift/some/base"
SECRETS = ("WANDB_API_KEY", "COMET_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
CANARY = "canary77x00secret"
RUNS = """
import socket, sys

connect = socket.socket.connect

def only_here(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("CONNECTS", address, file=sys.stderr)
        raise ConnectionRefusedError(address)
    return connect(self, address)

socket.socket.connect = only_here
from tests.support.fakes import Script, run_recipe

for name in sys.argv[1:]:
    run_recipe(Script(), f"tracker={name}", f"output_root={name}")
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run under each tracker, in a folder with its name."""
    folder = tmp_path_factory.mktemp("tracked")
    write_project(folder)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "PYTEST"))}
    places = [str(ROOT), *(str(path) for path in ROOT.glob("plugins/*")), os.environ.get("PYTHONPATH", "")]
    variables |= {"PYTHONPATH": os.pathsep.join(places), "HOME": str(folder / "home"), "NO_COLOR": "1"}
    variables |= {name: f"{CANARY}{index}" for index, name in enumerate(SECRETS)}
    command = [sys.executable, "-c", RUNS, *TRACKERS]
    return folder, subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_every_client_runs_offline_and_says_nothing(
    tracked: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = tracked
    assert result.returncode == 0, result.stderr
    for word in ("* Trackio", "COMET ", "INFO mlflow", "wandb:"):
        assert word not in result.stdout + result.stderr
    assert "is off for the rest of this run" not in result.stderr
    assert "CONNECTS" not in result.stderr
    ended = {name: (folder / name).glob("*/run.json") for name in TRACKERS}
    states = {name: [json.loads(path.read_text())["state"] for path in paths] for name, paths in ended.items()}
    assert states == {name: ["done"] for name in TRACKERS}


def test_weights_and_biases_keeps_the_run(tracked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    (path,) = (tracked[0] / "wandb").glob("mine-*/wandb/offline-run-*/*.wandb")
    data = path.read_bytes()
    assert all(text.encode() in data for text in (LOSS, LIFT, "dpo/verdict"))


def test_tensorboard_finds_the_run(tracked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (tracked[0] / "tensorboard").glob("mine-*/tensorboard/events.*")
    events = [Event.FromString(data) for data in records(path.read_bytes())]
    values = {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}
    assert values[LOSS, 1] == 1.0
    assert values[LIFT, 0] == 0.5
    assert "recipe/text_summary" in {tag for tag, _ in values}


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file of TensorFlow: length, checksum, bytes, checksum."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_mlflow_finds_the_run(tracked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    with sqlite3.connect(tracked[0] / "mlflow" / "mlflow" / "mlflow.db") as database:
        assert database.execute("select value, step from metrics where key = ?", [LOSS]).fetchall() == [(1.0, 1)]
        assert database.execute("select value from latest_metrics where key = ?", [LIFT]).fetchall() == [(0.5,)]
        assert database.execute("select value from tags where key = 'dpo/verdict'").fetchall() == [("pass",)]
        assert database.execute("select value from params where key = 'model.path'").fetchall() == [("base",)]
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]
    assert not list(tracked[0].rglob("mlruns"))


def test_trackio_finds_the_run(tracked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    with sqlite3.connect(tracked[0] / "trackio" / "trackio" / "posttrain.db") as database:
        logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    assert {LOSS: 1.0}.items() <= logged[0].items()
    assert {key: value for row in logged for key, value in row.items()}[LIFT] == 0.5


def test_comet_keeps_the_run(tracked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    (path,) = (tracked[0] / "comet").glob("mine-*/comet/*.zip")
    with zipfile.ZipFile(path) as archive:
        text = archive.read("messages.json").decode()
    assert all(word in text for word in (LOSS, LIFT, "dpo/verdict"))


def test_no_record_holds_a_secret(tracked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, result = tracked
    assert CANARY not in result.stderr
    found = [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    for path in folder.rglob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            found += [path for name in archive.namelist() if CANARY.encode() in archive.read(name)]
    assert found == []
