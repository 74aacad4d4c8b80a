"""The scores of a gate beside those of the ``lm_eval`` command itself, document by document."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.gate.spec import DocumentScore, GateRequest
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.systems import Loading
from tests.support import warm
from tests.support.adapters import Log
from tests.support.quizzes import write_quizzes
from tests.support.tiny import base_source, tiny_tokenizer

SEED, BATCH = 7, 8
METRICS = {
    "generate0": "exact_match",
    "generate2": "exact_match",
    "choose0": "acc",
    "choose2": "acc",
    "likelihood0": "surprise",
}
TWICE = """
import functools, sys
import lm_eval.tasks as tasks
from lm_eval.__main__ import cli_evaluate
# without the index of the registered tasks, which takes longer than the rest and lists none of these
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
for name in ("plain", "chat"):
    sys.argv = ["lm_eval", *sys.argv[1:]] if name == "plain" else [*sys.argv, "--apply_chat_template"]
    sys.argv[sys.argv.index("--output_path") + 1] = name
    cli_evaluate()
"""
"""The command with the given words, without and with the chat template, in one process."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # under an adapter, the command cuts away embeddings that no token has, and with them their share of the softmax
    root = write_quizzes(tmp_path_factory.mktemp("command"), vocab_size=len(tiny_tokenizer()))
    config = PeftConfig.from_pretrained(root / "candidate")
    config.base_model_name_or_path = str(root / "base")
    config.save_pretrained(root / "candidate")
    return root


@pytest.fixture(scope="module")
def samples(folder: Path) -> dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]]:
    """Return the log of the command: by chat or not and task, then by filter and document."""
    words = ["--model", "hf", "--model_args", "pretrained=base,peft=candidate,dtype=float32", "--device", "cpu"]
    words += ["--tasks", *(f"{name}.yaml" for name in METRICS), "--batch_size", str(BATCH), "--seed", str(SEED)]
    words += ["--log_samples", "--output_path", "plain"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = warm.run([sys.executable, "-c", TWICE, *words], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    found = {}
    for chat in ("plain", "chat"):
        for name in METRICS:
            (file,) = (folder / chat).rglob(f"samples_{name}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found[chat, name] = {(row["filter"], row["doc_id"]): row for row in rows}
    return found


def scores(folder: Path, tmp_path: Path, name: str, chat: bool) -> dict[tuple[str, int], DocumentScore]:
    """Return the scores of the gate."""
    base = base_source(folder / "base")
    request = GateRequest(
        stage="sft",
        gate=GateConfig(batch_size=BATCH, seed=SEED),
        tasks={
            name: GateTask(
                task=str(folder / f"{name}.yaml"), role=Role.lift, metric=METRICS[name], chat=chat,
                filter="first" if name.startswith("generate") else None,
            )
        },
        systems={"candidate": replace(base, name="candidate", adapter=folder / "candidate", digest="candidate")},
        dtype="float32",
        cache=tmp_path / "cache",
        scorecard=tmp_path / "scorecard.jsonl",
    )  # fmt: skip
    card = evaluate(request, Log(), Loading(load_model, load_tokenizer, "cpu"))
    return {(row.filter, row.doc_id): row for row in card.rows}


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", METRICS)
def test_every_document_scores_as_in_the_command(
    folder: Path,
    samples: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]],
    tmp_path: Path,
    name: str,
    chat: bool,
) -> None:
    expected = samples["chat" if chat else "plain", name]
    found = scores(folder, tmp_path, name, chat)
    assert found.keys() == expected.keys()
    for key, row in found.items():
        sample = expected[key]
        assert row.metrics == pytest.approx({metric: sample[metric] for metric in row.metrics}, abs=1e-5)
        if name.startswith("generate"):
            assert row.response == sample["resps"][0][0]
        elif name.startswith("choose"):
            likelihoods = [float(answers[0][0]) for answers in sample["resps"]]
            assert row.response == sample["doc"]["choices"][likelihoods.index(max(likelihoods))]
        else:
            assert row.response == f"log-likelihood {float(sample['resps'][0][0][0]):.4f}"
    assert len({row.response for row in found.values()}) > 3
