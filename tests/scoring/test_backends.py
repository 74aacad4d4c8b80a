"""vLLM as the backend: one engine for systems on shared weights, and no comparison across backends.

There is no vLLM here: an engine of transformers takes its place, and applies the adapter that it is asked for.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import cli
from posttrain.artifact import ModelSource
from posttrain.config.schema import Backend, GateConfig, GateTask, Role
from posttrain.errors import BadInput
from posttrain.gate.spec import GateRequest, Scorecard
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.scoring.checks import check_backend
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.systems import Loading
from tests.support.adapters import Log, edit, write_adapters
from tests.support.tiny import base_source


@dataclass(frozen=True)
class Request:
    """vllm.lora.request.LoRARequest."""

    name: str
    number: int
    path: str


class Engine(HFLM):
    """lm_eval's VLLM, with the settings of gates."""

    started: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, pretrained: str, tokenizer: str, batch_size: int, **settings: Any) -> None:
        type(self).started.append({"pretrained": pretrained, **settings})
        model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=settings["dtype"])
        super().__init__(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tokenizer), batch_size=batch_size)
        self._plain, self.lora_request = model, None

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._adapted():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._adapted():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        chosen: Request | None = self.lora_request
        self._model = self._plain if chosen is None else PeftModel.from_pretrained(self._plain, chosen.path).eval()
        yield
        self._plain = self._model.unload() if chosen is not None else self._plain


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package vllm, and lm_eval's model for it."""
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": Request},
        "lm_eval.models.vllm_causallms": {"VLLM": Engine},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Engine, "started", [])


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("backends"))


def systems(material: Path) -> dict[str, ModelSource]:
    base = base_source(material / "base")
    others = {
        name: replace(base, name=name, adapter=material / name, digest=f"digest of {name}")
        for name in ("good", "other")
    }
    return {"base": base, "candidate": others["good"], "parent": others["other"]}


def request(material: Path, folder: Path, backend: Backend, **changed: Any) -> GateRequest:
    found = GateRequest(
        stage="sft", gate=GateConfig(batch_size=16, backend=backend), dtype="float32",
        tasks={"quiz": GateTask(task=str(material / "quiz.yaml"), role=Role.lift, metric="acc")},
        systems=systems(material), cache=folder / "cache", scorecard=folder / "scorecard.jsonl",
    )  # fmt: skip
    return replace(found, **changed)


def run(asked: GateRequest) -> Scorecard:
    return evaluate(asked, Log(), Loading(load_model, load_tokenizer, "cpu"))


def test_one_engine_answers_for_every_adapter(material: Path, tmp_path: Path) -> None:
    found = run(request(material, tmp_path, Backend.vllm))
    (engine,) = Engine.started
    assert engine["pretrained"] == str(material / "base")
    assert engine["max_lora_rank"] == 8  # the least that vLLM can set aside for rank 4
    plain = run(request(material, tmp_path, Backend.hf))
    assert len(Engine.started) == 1
    assert [row.response for row in found.rows] == [row.response for row in plain.rows]
    assert len({tuple(row.response for row in found.rows if row.system == name) for name in systems(material)}) == 3


def test_what_one_system_wrote_is_no_answer_of_another(material: Path, tmp_path: Path) -> None:
    written = (material / "quiz.yaml").read_text().replace("multiple_choice", "generate_until")
    lines = [line for line in written.splitlines() if not line.startswith("doc_to_choice")]
    text = "\n".join([*lines, "generation_kwargs: {until: [], max_gen_toks: 8, do_sample: false}"])
    (tmp_path / "write.yaml").write_text(text.replace("metric: acc", "metric: exact_match"))
    (tmp_path / "quiz.jsonl").write_bytes((material / "quiz.jsonl").read_bytes())
    task = GateTask(task=str(tmp_path / "write.yaml"), role=Role.lift, metric="exact_match")
    found = run(request(material, tmp_path, Backend.vllm, tasks={"write": task}))
    plain = run(request(material, tmp_path, Backend.hf, tasks={"write": task}))
    assert [row.response for row in found.rows] == [row.response for row in plain.rows]
    assert len({tuple(row.response for row in found.rows if row.system == name) for name in systems(material)}) == 3


def test_lm_evals_own_model_takes_these_settings(material: Path) -> None:
    from posttrain.scoring.harness.vllm import Vllm

    Vllm({"candidate": systems(material)["candidate"]}, "float32", material / "base", 16, 0)
    source = Path(HFLM.__module__.replace(".", "/")).with_name("vllm_causallms.py")
    root = Path(sys.modules["lm_eval"].__path__[0]).parent
    tree = ast.parse((root / source).read_text(encoding="utf-8"))
    model = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    (init,) = (node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = {argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)}
    assert {*Engine.started[0], "tokenizer", "batch_size"} <= names
    assert "LoRARequest(" in ast.unparse(init)
    assert "lora_request=self.lora_request" in ast.unparse(model)


def test_what_one_backend_scored_is_no_score_of_the_other(material: Path, tmp_path: Path) -> None:
    run(request(material, tmp_path, Backend.hf))
    assert not Engine.started
    run(request(material, tmp_path, Backend.vllm))
    assert len(Engine.started) == 1
    assert len(list((tmp_path / "cache").glob("*.jsonl"))) == 6
    run(request(material, tmp_path, Backend.vllm))
    assert len(Engine.started) == 1


def test_scores_of_another_backend_are_no_baseline(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def gate(*words: str) -> int:
        given = [f"adapter={material / 'good'}", "gate=quiz", "--config-dir", str(material / "conf")]
        with pytest.raises(SystemExit) as ended:
            cli.main(["gate", *given, "baseline=scores.json", *words])
        return int(str(ended.value.code))

    assert gate("--update-baseline") == 0
    assert json.loads(Path("scores.json").read_text())["asked"]["backend"] == "hf"
    assert gate("gate.backend=vllm") == 2
    assert "another backend: hf then, vllm now" in capsys.readouterr().err
    assert gate("gate.backend=vllm", "--update-baseline") == 0
    assert gate("gate.backend=vllm") == 0


@pytest.mark.parametrize(
    ("settings", "config", "what"),
    [
        ({"quantization": "nf4"}, {}, "quantised weights"),
        ({"added_tokens": ("<|new|>",)}, {}, "added tokens"),
        ({}, {"use_dora": True}, "DoRA"),
        ({}, {"modules_to_save": ["lm_head"]}, "whole copies of layers"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 initialisation"),
        ({}, {"bias": "lora_only"}, "trained biases"),
        ({}, {"layer_replication": [[0, 2], [0, 2]]}, "repeated layers"),
        ({}, {"trainable_token_indices": [5]}, "added tokens"),
        ({}, {"peft_type": "LOHA"}, "another form than LoRA"),
    ],
)
def test_parts_of_an_adapter_unknown_to_vllm_are_rejected(
    material: Path, tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], what: str
) -> None:
    from posttrain.scoring.harness.vllm import Vllm

    shutil.copytree(material / "good", tmp_path / "good")
    edit(tmp_path / "good" / "adapter_config.json", **config)
    source = replace(systems(material)["candidate"], adapter=tmp_path / "good", **settings)
    with pytest.raises(BadInput, match=what):
        Vllm({"candidate": source}, "float32", material / "base", 16, 0)


def test_ranks_by_layer_count(material: Path, tmp_path: Path) -> None:
    from posttrain.scoring.harness.vllm import Vllm

    shutil.copytree(material / "good", tmp_path / "good")
    edit(tmp_path / "good" / "adapter_config.json", rank_pattern={"q_proj": 40})
    source = replace(systems(material)["candidate"], adapter=tmp_path / "good")
    Vllm({"candidate": source}, "float32", material / "base", 16, 0)
    assert Engine.started[0]["max_lora_rank"] == 64


def test_a_backend_that_is_not_installed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    gate: Any = SimpleNamespace(backend=Backend.vllm)
    assert check_backend(gate) == []
    monkeypatch.delitem(sys.modules, "vllm")
    (problem,) = check_backend(gate)
    assert (problem.where, problem.what) == ("backend", "vllm is not installed")
    assert check_backend(SimpleNamespace(backend=Backend.hf)) == []  # type: ignore[arg-type]
