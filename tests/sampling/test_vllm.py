"""Answers by vLLM, whose interface a stand-in speaks, and by the processes of a launch: those that one would keep."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.artifact import ModelSource, verify
from posttrain.cli import dispatch
from posttrain.config.launch import LaunchConfig, Launcher
from posttrain.config.schema import ModelConfig
from posttrain.data.questions import read_question
from posttrain.errors import BadInput
from posttrain.host import plugins
from posttrain.launch.answers import SamplingGroup, sampling_group
from posttrain.model.base import resolve_base
from posttrain.model.loading import load_model
from posttrain.model.vllm_process import COMMAND
from posttrain.sampling import answers, vllm
from posttrain.sampling.answers import Asking
from posttrain.sampling.sampler import Drawing
from posttrain.testing import Project
from tests.support.asking import QUESTIONS, asking_project, asking_source
from tests.support.command import main

ROOT = Path(__file__).parents[2]
STANDIN = f"{sys.executable} -m tests.support.vllm serve"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return asking_project(tmp_path_factory.mktemp("project"))


def parent_of(project: Project) -> ModelSource:
    artifact = verify(project.folder / "sft")
    return artifact.source(resolve_base(ModelConfig(path=artifact.manifest.base.name), artifact.pins))


def test_vllm_answers_with_a_seed_for_each_and_what_it_wrote_before_it_died_is_kept(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[str, Any] = {"k": 6, "temperature": 3.0, "max_tokens": 8, "reward": "regex"}
    journal, kept = tmp_path / "journal", tmp_path / "runs" / "cache" / "answers"
    monkeypatch.setenv("STANDIN_JOURNAL", str(journal))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(vllm, "BLOCK", 2 * few["k"])
    words = [str(project.folder / "sft"), str(project.folder / "questions.jsonl"), str(tmp_path / "pairs.jsonl")]
    words += [f"{key}={value}" for key, value in few.items()]
    words += [f"output_root={tmp_path / 'runs'}", "keep=labels", "backend=vllm", "--vllm-command", STANDIN]

    def asked() -> list[str]:
        return [json.loads(line)["path"] for line in journal.read_text().splitlines()]

    # it dies in the middle of the second block
    monkeypatch.setenv("STANDIN_ENDS_AFTER", str(3 * few["k"]))
    assert main("sample", *words) == 75
    told = capsys.readouterr()
    assert "vLLM ended with status 3: ValueError: out of memory" in told.err
    assert "the same command resumes" in told.err
    assert [path.name for path in kept.glob("*/*")] == ["block-00000.json"]
    journal.unlink()
    monkeypatch.delenv("STANDIN_ENDS_AFTER")
    seen: list[tuple[Any, Any]] = []
    inner = vllm.Server.write
    monkeypatch.setattr(vllm.Server, "write", lambda *given: seen.append((given[1], inner(*given))) or seen[-1][1])
    assert main("sample", *words) == 0
    assert asked().count("/v1/completions") == 2 * few["k"]
    # a stage with the same settings asks nothing again; by this reward no two answers that ended differ
    monkeypatch.setenv(COMMAND, STANDIN)
    with pytest.raises(BadInput, match="no answer of sft can be kept as pairs: 24 answers to 4 questions"):
        project.run(tmp_path / "runs", asking_source(project, **(few | {"reward": "ended"}), backend="vllm"))
    assert asked().count("begun") == 1
    # each answer has a seed of its own, and the log-probabilities of the distribution that it was drawn from
    ((prompts, groups),) = seen
    model: Any = load_model(parent_of(project), "float32").double().eval()
    for prompt, group in zip(prompts, groups, strict=True):
        assert len({answer.ids for answer in group}) > few["k"] / 2
        answer = group[0]
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        log_probs_TV = (logits_TV / few["temperature"]).log_softmax(-1)
        expected = [float(log_probs_TV[place, token]) for place, token in enumerate(answer.ids)]
        assert answer.log_probs == pytest.approx(expected, abs=1e-3)
        assert answer.ended or len(answer.ids) == few["max_tokens"]


def test_another_vllm_writes_other_answers_and_a_missing_one_is_named_in_the_plan(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    found = []
    for number in ("0.1", "0.2"):
        monkeypatch.setenv("STANDIN_VERSION", number)
        found.append(vllm.identity(STANDIN.split())["vllm"])
    assert found == ["0.1", "0.2"]
    assert vllm.identity([*STANDIN.split(), "--seed", "1"])["options"] == ["--seed", "1"]
    with pytest.raises(BadInput, match="names no version"):
        vllm.identity([sys.executable, "-c", "print()", "serve"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(COMMAND, raising=False)
    with pytest.raises(BadInput, match=r"dpo.data.on_policy.backend: there is no command vllm\n.*POSTTRAIN_VLLM"):
        project.plan(plugins.load(), asking_source(project, backend="vllm"))
    with pytest.raises(BadInput, match=r"--vllm-command: names a vLLM that nothing asks\n *Set backend=vllm as well"):
        dispatch(["sample", "artifact", "questions.jsonl", str(tmp_path / "new.jsonl"), "--vllm-command", STANDIN])


@pytest.mark.long
def test_the_processes_of_a_launch_write_the_answers_that_one_would(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(answers, "BLOCK", 24)
    parent = parent_of(project)
    asked = [read_question(each, f"q:{number}") for number, each in enumerate(QUESTIONS)]
    launch, notes, parts = LaunchConfig(kind=Launcher.local, processes=2), list[str](), list[tuple[int, int]]()
    alone = Asking(
        source=parent, base=parent, dtype="float32", drawing=Drawing(k=24, temperature=3.0, max_tokens=12, seed=1),
        kept=tmp_path / "one", part=lambda done, total, what: parts.append((done, total)), stop_requested=lambda: False,
    )  # fmt: skip
    expected = answers.ask(asked, alone)
    assert parts == [(24, 96), (48, 96), (72, 96), (96, 96)]
    parts.clear()
    group = SamplingGroup(launch=launch, folder=tmp_path / "stage", note=notes.append)
    found = answers.ask(asked, replace(alone, kept=tmp_path / "two", processes=group))
    assert found == expected
    assert notes == ["2 processes answer 4 blocks of questions"]
    assert parts == [(24, 96), (48, 96), (72, 96), (96, 96)]
    assert [path.name for path in (tmp_path / "stage").iterdir()] == []
    shown = [sorted(path.name for path in (tmp_path / each).glob("answers/*/*")) for each in ("one", "two")]
    assert shown[0] == shown[1]
    assert sampling_group(LaunchConfig(), tmp_path, notes.append) is None
