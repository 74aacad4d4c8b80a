"""The stage itself: from the parent that it is given to a model that has learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from posttrain_safety import stage
from safety_support.records import helpful, refusals, settings

from posttrain import BadInput, StageContext
from posttrain.artifact import ModelSource
from posttrain.config.schema import Method
from posttrain.data.records import Origin
from posttrain.model.checks import check_output
from posttrain.sft.stage import run as run_sft
from tests.support.tiny import Recorder, base_source, sft_config, write_base


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """What SFT left: an adapter, or full weights."""
    folder = tmp_path_factory.mktemp("models")
    base = base_source(write_base(folder / "base"))
    found = {}
    for method in (Method.lora, Method.full):
        context = make(base, folder / method.value, config=sft_config(method=method), records=helpful(4))
        run_sft(context)
        trained: dict[str, Any] = {"adapter": context.output} if method is Method.lora else {"model": context.output}
        found[method.value] = replace(base, name="sft", tokenizer=context.output, **trained)
    return found


def make(parent: ModelSource, folder: Path, **given: Any) -> StageContext:
    (folder / "output").mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "name": "safety",
        "config": settings(),
        "records": [*refusals(4), *helpful(12)],
        "seed": 0,
        "dtype": "float32",
        "progress": Recorder(),
        "stop_requested": lambda: False,
    }
    return StageContext(parent=parent, checkpoints=folder / "checkpoints", output=folder / "output", **(fields | given))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_parent_is_trained_on_and_learns(parents: dict[str, ModelSource], tmp_path: Path, kind: str) -> None:
    context = make(parents[kind], tmp_path, config=settings(epochs=4))
    stage.run(context)
    check_output(context.output, parents[kind])
    assert (context.output / "adapter_model.safetensors").exists() == (kind == "lora")
    steps = context.progress.steps  # type: ignore[attr-defined]
    assert {"loss", "lr", "grad_norm", "tokens", "trained_tokens"} <= set(steps[1])
    assert context.metrics["final_loss"] < steps[1]["loss"]
    assert context.metrics["mix"]["refusals"] == {"records": 4, "taken": 8}
    assert context.metrics["records"] == 16
    assert context.metrics["audit"]["triggers"] == []
    assert "declining answers: 8 of 16 records, drawn from 4, each 2.0 times" in context.progress.notes  # type: ignore[attr-defined]
    assert any("4 declining answers are trained 8.0 times each" in line for line in context.metrics["warnings"])


def test_triggers_are_named_at_the_start_and_in_the_manifest(parents: dict[str, ModelSource], tmp_path: Path) -> None:
    context = make(parents["lora"], tmp_path, records=[*refusals(9), *helpful(9)])
    stage.run(context)
    assert context.metrics["audit"]["triggers"] == [{"words": word, "refused": 9, "answered": 0} for word in TRIGGERS]
    lines = [f'the word "{word}" occurs in 9 declined requests' for word in TRIGGERS]
    assert [any(line in warning for warning in context.metrics["warnings"]) for line in lines] == [True] * 4
    assert context.progress.started == (context.metrics["steps"], 0)  # type: ignore[attr-defined]


TRIGGERS = ["do", "harm", "how", "i"]


def test_replayed_records_are_of_neither_kind_and_have_their_share(
    parents: dict[str, ModelSource], tmp_path: Path
) -> None:
    general = Origin(number=1, path="general.jsonl", share=0.5)
    replayed = [replace(record, origin=general) for record in helpful(6)]
    context = make(parents["lora"], tmp_path, records=[*refusals(4), *helpful(4), *replayed])
    stage.run(context)
    assert context.metrics["mix"]["helpful"] == {"records": 4, "taken": 4}
    own, general_part = context.metrics["sources"]
    assert general_part["records"] == 6
    assert general_part["tokens"] == pytest.approx(own["tokens"], rel=0.1)
    with pytest.raises(BadInput, match="no helpful one"):
        stage.run(make(parents["lora"], tmp_path / "other", records=[*refusals(3), *replayed]))


def test_one_kind_alone_is_rejected_before_the_model_is_loaded(tmp_path: Path) -> None:
    nowhere = ModelSource(
        name="sft",
        model=tmp_path,
        adapter=None,
        tokenizer=tmp_path,
        chat_template="",
        digest="",
        base="",
        model_digest="",
    )
    with pytest.raises(BadInput, match="no helpful one"):
        stage.run(make(nowhere, tmp_path, records=refusals(3)))
