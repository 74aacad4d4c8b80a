"""Scoring through lm_eval: the same scores as lm_eval's own loop, and none of its traps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.evaluator import evaluate as reference_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel

from posttrain.artifact import ModelSource
from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.engine import arithmetic
from posttrain.engine.arithmetic import Rates
from posttrain.errors import ArtifactDamaged, BadInput
from posttrain.gate import plugin as gate_plugin
from posttrain.gate.spec import DocumentScore, GateRequest, Scorecard
from posttrain.gate.verdict import judge
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.scoring import plugin
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.harness.tasks import _is_complete, load_leaves, preflight
from posttrain.scoring.scorecard import read_questions, read_scorecard
from posttrain.scoring.systems import Loading, SharedWeights
from tests.support.adapters import Log
from tests.support.quizzes import LIKELIHOOD, METRICS, SCORING, gate_task, quiz_row, save_adapter, write_quizzes
from tests.support.tiny import base_source, write_base

SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two adapters with random weights, and task files with their data."""
    return write_quizzes(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def base(folder: Path) -> ModelSource:
    return base_source(folder / "base")


def adapted(base: ModelSource, path: Path) -> ModelSource:
    return replace(base, name=path.name, adapter=path, digest=f"digest of {path.name}")


@dataclass
class CountingLoader:
    """Loads models and counts."""

    model: Callable[[ModelSource, str], Any] = load_model
    loaded: list[ModelSource] = field(default_factory=list)

    def load(self, source: ModelSource, dtype: str) -> Any:
        self.loaded.append(source)
        return self.model(source, dtype)

    def loading(self) -> Loading:
        return Loading(self.load, load_tokenizer, "cpu")


def never_load(source: ModelSource, dtype: str) -> Any:
    raise AssertionError(f"{source.name} was loaded")


def make_request(
    folder: Path, tmp_path: Path, systems: Mapping[str, ModelSource], tasks: Mapping[str, GateTask], **gate: Any
) -> GateRequest:
    return GateRequest(
        stage="sft",
        gate=GateConfig(**{"batch_size": 8, "seed": SEED, **gate}),
        tasks=tasks,
        systems=systems,
        dtype="float32",
        cache=tmp_path / "cache",
        scorecard=tmp_path / "scorecard.jsonl",
    )


def two_systems(folder: Path, base: ModelSource) -> dict[str, ModelSource]:
    return {"base": base, "candidate": adapted(base, folder / "candidate")}


def run(request: GateRequest, loader: CountingLoader | None = None) -> tuple[Scorecard, CountingLoader, Log]:
    loader, log = loader or CountingLoader(), Log()
    return evaluate(request, log, loader.loading()), loader, log


def rows_of(card: Scorecard, system: str, filter_name: str | None = None) -> list[DocumentScore]:
    return [row for row in card.rows if row.system == system and filter_name in (None, row.filter)]


def reference_samples(task_file: Path, name: str, model: Any, tokenizer: Any, chat: bool) -> list[dict[str, Any]]:
    """Return the samples of lm_eval's own evaluate, document by document."""
    tasks = TaskManager(include_defaults=False).load(str(task_file))
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SEED)
    responder = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, backend="causal")
    results = reference_evaluate(
        responder, tasks, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat, log_samples=True
    )
    assert results is not None
    return list(results["samples"][name])


@pytest.mark.parametrize("name", ["generate0", "generate2", "choose0", "choose2", "likelihood0"])
def test_scores_equal_those_of_lm_eval(
    folder: Path, base: ModelSource, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = {**two_systems(folder, base), "parent": adapted(base, folder / "parent")}
    card, loader, _ = run(make_request(folder, tmp_path, systems, {name: gate_task(folder, name)}))
    monkeypatch.chdir(folder)  # lm_eval itself resolves data files from the working directory
    assert len(loader.loaded) == 1
    for system, source in systems.items():
        samples = reference_samples(
            folder / f"{name}.yaml",
            name,
            load_model(source, "float32"),
            load_tokenizer(source),
            chat="generate" in name,
        )
        expected = {(sample["filter"], sample["doc_id"]): sample for sample in samples}
        found = {(row.filter, row.doc_id): row for row in rows_of(card, system)}
        assert found.keys() == expected.keys()
        for key, row in found.items():
            assert row.metrics == pytest.approx({name: expected[key][name] for name in row.metrics}, abs=1e-4)
            if "generate" in name:
                assert row.response == expected[key]["resps"][0][0]
    responses = [{row.doc_id: row.response for row in rows_of(card, system)} for system in systems]
    assert responses[0] != responses[1] != responses[2]  # the adapters do change what is answered


def test_adding_systems_changes_no_score(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    """An adapter beside another on shared weights scores bit for bit as alone."""
    tasks = {"likelihood0": gate_task(folder, "likelihood0")}
    parent = adapted(base, folder / "parent")
    both, _, _ = run(make_request(folder, tmp_path / "a", {**two_systems(folder, base), "parent": parent}, tasks))
    alone, _, _ = run(make_request(folder, tmp_path / "b", {"base": base, "candidate": parent}, tasks))
    assert [row.metrics for row in rows_of(both, "parent")] == [row.metrics for row in rows_of(alone, "candidate")]
    assert [row.metrics for row in rows_of(both, "base")] == [row.metrics for row in rows_of(alone, "base")]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()


def test_an_identical_adapter_never_passes_a_lift(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    save_adapter(tmp_path / "same", seed=0, fill=0.0)
    systems = {"base": base, "candidate": adapted(base, tmp_path / "same")}
    names = ("generate0", "choose2", "likelihood0")
    request = make_request(folder, tmp_path, systems, {name: gate_task(folder, name) for name in names})
    card, _, _ = run(request)
    base_rows, candidate_rows = rows_of(card, "base"), rows_of(card, "candidate")
    assert [row.metrics for row in base_rows] == [row.metrics for row in candidate_rows]
    verdict = judge(request, card)
    assert [task.state for task in verdict.tasks] == ["undecided"] * 3
    assert read_scorecard(request.scorecard) == list(card.rows)


def test_every_system_is_asked_the_same(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    tasks = {name: gate_task(folder, name) for name in ("generate2", "choose2")}
    card, _, _ = run(make_request(folder, tmp_path, two_systems(folder, base), tasks))
    asked = [
        {(row.task, row.filter, row.doc_id): row.request_hash for row in rows_of(card, s)}
        for s in ("base", "candidate")
    ]
    assert asked[0] == asked[1]
    assert len(set(asked[0].values())) == 48
    prompts = read_questions(tmp_path / "questions.jsonl")
    assert prompts.keys() == {(row.task, row.doc_id) for row in card.rows}
    assert len({each.prompt for each in prompts.values()}) == 24  # both tasks word their documents alike


# --- Cache ------------------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_when_every_score_is_known(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    request = make_request(folder, tmp_path, two_systems(folder, base), {"choose0": gate_task(folder, "choose0")})
    first, _, _ = run(request)
    again, _, log = run(request, CountingLoader(never_load))
    assert again == first
    assert log == Log()


def test_a_cached_system_never_answers_for_another(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    tasks = {"likelihood0": gate_task(folder, "likelihood0")}
    parent = adapted(base, folder / "parent")
    run(make_request(folder, tmp_path, two_systems(folder, base), tasks))
    warm, loader, _ = run(make_request(folder, tmp_path, {"base": base, "candidate": parent}, tasks))
    cold, _, _ = run(make_request(folder, tmp_path / "a", {"base": base, "candidate": parent}, tasks))
    assert warm == cold
    assert len(loader.loaded) == 1
    stacked, loader, _ = run(
        make_request(folder, tmp_path, {**two_systems(folder, base), "parent": parent}, tasks),
        CountingLoader(never_load),
    )
    assert [row.metrics for row in rows_of(stacked, "parent")] == [row.metrics for row in rows_of(cold, "candidate")]


@pytest.mark.parametrize("change", ["batch_size", "dtype", "data", "template", "shots", "seed", "none"])
def test_whatever_answers_depend_on_asks_anew(folder: Path, base: ModelSource, tmp_path: Path, change: str) -> None:
    work = copied_task(folder, tmp_path, "generate2")
    task = gate_task(work, "generate2", limit=6)
    request = make_request(folder, tmp_path, {"candidate": base}, {"quiz": task})
    run(request)
    if change == "batch_size":
        request = replace(request, gate=replace(request.gate, batch_size=4))
    elif change == "seed":
        request = replace(request, gate=replace(request.gate, seed=8))
    elif change == "dtype":
        request = replace(request, dtype="bfloat16")
    elif change == "data":
        text = (work / "data" / "quiz.jsonl").read_text()
        (work / "data" / "quiz.jsonl").write_text(text.replace('"question": "', '"question": "+'))
    elif change == "template":
        request = replace(request, systems={"candidate": replace(base, chat_template=base.chat_template + " ")})
    elif change == "shots":
        request = replace(request, tasks={"quiz": replace(task, num_fewshot=1)})
    _, loader, _ = run(request)
    assert len(loader.loaded) == (change != "none")


@pytest.mark.parametrize(
    ("rates", "backend_dtype"), [((90.0, 3.0), "bfloat16 in float32"), ((90.0, 300.0), "bfloat16")]
)
def test_every_system_computes_in_the_faster_format_and_the_key_says_which(
    folder: Path, base: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: Any, backend_dtype: str
) -> None:
    monkeypatch.setattr(arithmetic, "measure_rates", lambda *_: Rates(float32=rates[0], bfloat16=rates[1]))
    tasks = {"quiz": gate_task(folder, "likelihood0", limit=6)}
    request = make_request(folder, tmp_path, two_systems(folder, base), tasks)
    request, formats = replace(request, dtype="bfloat16"), []

    def loading(source: ModelSource, dtype: str) -> Any:
        formats.append(dtype)
        return load_model(source, dtype)

    _, _, log = run(request, CountingLoader(loading))
    assert formats == [backend_dtype]
    wide = backend_dtype != "bfloat16"
    assert ("arithmetic: float32 on weights stored as bfloat16" in log.notes) == wide
    run(replace(request, compute_dtype="bfloat16"), CountingLoader(loading))
    assert formats == [backend_dtype, *(["bfloat16"] if wide else [])], "kept scores are of one format"
    _, _, log = run(request, CountingLoader(never_load))
    assert not log.notes


def copied_task(folder: Path, tmp_path: Path, name: str) -> Path:
    """Copy a task and its data to a folder of its own."""
    work = tmp_path / "tasks"
    (work / "data").mkdir(parents=True)
    for file in (f"{name}.yaml", "scoring.py", "data/quiz.jsonl", "data/train.jsonl"):
        (work / file).write_text((folder / file).read_text())
    return work


def test_another_way_to_score_gives_new_scores_to_the_same_answers(
    folder: Path, base: ModelSource, tmp_path: Path
) -> None:
    work = copied_task(folder, tmp_path, "likelihood0")
    request = make_request(folder, tmp_path, {"candidate": base}, {"quiz": gate_task(work, "likelihood0", limit=6)})
    before, _, _ = run(request)
    (work / "scoring.py").write_text(SCORING.replace("-value", "-2 * value"))
    after, _, _ = run(request, CountingLoader(never_load))
    assert [row.metrics["surprise"] for row in after.rows] == [2 * row.metrics["surprise"] for row in before.rows]


def test_tasks_that_put_the_same_requests_share_the_answers(
    folder: Path, base: ModelSource, tmp_path: Path, asked: list[int]
) -> None:
    work = copied_task(folder, tmp_path, "generate0")
    other = (work / "generate0.yaml").read_text().replace("task: generate0", "task: length")
    other = other.replace("{{answer}}", "b").replace("([a-z0-9])", "([a-z])")
    (work / "length.yaml").write_text(other)
    first, second = gate_task(work, "generate0"), replace(gate_task(work, "generate0"), task=str(work / "length.yaml"))
    tasks = {"first": first, "second": second}
    systems = two_systems(folder, base)
    alone = [run(make_request(folder, tmp_path / name, systems, {name: task}))[0] for name, task in tasks.items()]
    asked.clear()
    both, _, _ = run(make_request(folder, tmp_path / "both", systems, tasks))
    assert len(asked) == 2 * 3  # systems, and blocks of 8 of 24 documents
    assert sorted(both.rows, key=str) == sorted((row for card in alone for row in card.rows), key=str)
    assert {row.target for row in both.rows if row.task == "second"} == {"b"}
    assert len({row.target for row in both.rows if row.task == "first"}) > 1


def test_a_damaged_entry_is_scored_again_and_said_so(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    request = make_request(folder, tmp_path, {"candidate": base}, {"choose0": gate_task(folder, "choose0")})
    first, _, _ = run(request)
    (entry,) = (tmp_path / "cache").glob("*.jsonl")
    (answers,) = (tmp_path / "cache").glob("*.answers")
    for harmed, loads in ((answers.read_text(), 0), (answers.read_text()[:-3], 1)):
        answers.write_text(harmed)
        entry.write_text(entry.read_text().replace('"acc":0.0', '"acc":1.0'))
        again, loader, log = run(request)
        assert again == first
        assert len(loader.loaded) == loads
        assert "not used" in log.notes[0]


# --- Blocks -----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands in for the death of the process."""


@dataclass
class Fatal(Log):
    """Dies after so many more blocks."""

    asked: list[int] = field(default_factory=list)
    more: int = 1

    def __post_init__(self) -> None:
        self.last = len(self.asked) + self.more

    def advance(self, system: str, task: str, done: int, total: int, tokens: int = 0) -> None:
        if len(self.asked) == self.last:
            raise Killed


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of requests in each call to the model."""
    calls: list[int] = []

    def counting(kind: str) -> None:
        original = getattr(HFLM, kind)

        def answered(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
            calls.append(len(requests))
            return original(self, requests, disable_tqdm=disable_tqdm)

        monkeypatch.setattr(HFLM, kind, answered)

    for kind in ("generate_until", "loglikelihood"):
        counting(kind)
    return calls


def test_an_evaluation_killed_at_any_block_asks_no_block_twice(
    folder: Path, base: ModelSource, tmp_path: Path, asked: list[int]
) -> None:
    tasks = {name: gate_task(folder, name) for name in ("generate2", "choose2", "likelihood0")}
    systems = two_systems(folder, base)
    whole, _, _ = run(make_request(folder, tmp_path / "a", systems, tasks))
    blocks, asked[:] = list(asked), []
    request = make_request(folder, tmp_path / "b", systems, tasks)
    assert len(blocks) == 2 * 3 * 3  # systems, tasks, and blocks of 8 of 24 documents
    for _ in blocks:
        with pytest.raises(Killed):
            evaluate(request, Fatal(asked=asked), CountingLoader().loading())
    again, _, _ = run(request)
    assert again == whole
    assert asked == blocks


def test_a_block_that_was_not_kept_is_asked_again(
    folder: Path, base: ModelSource, tmp_path: Path, asked: list[int]
) -> None:
    request = make_request(folder, tmp_path, {"candidate": base}, {"quiz": gate_task(folder, "choose2")})
    whole, _, _ = run(replace(request, cache=tmp_path / "a"))
    asked.clear()
    with pytest.raises(Killed):
        evaluate(request, Fatal(asked=asked, more=2), CountingLoader().loading())
    (kept,) = (tmp_path / "cache").glob("*.answers")
    first, second = (line for line in kept.read_text().splitlines() if line)
    for torn in (first + "\n" + second[:-30], first.replace("-", "-1", 1) + "\n" + second, "", first + first, "[]"):
        kept.write_text(torn)
        asked.clear()
        again, _, _ = run(request)
        assert again == whole
        assert len(asked) == 3 - sum(line in (first, second) for line in torn.split("\n"))
        for entry in (tmp_path / "cache").iterdir():
            entry.unlink()


def test_questions_are_asked_by_length_and_answered_in_order(
    folder: Path, base: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    original = HFLM._model_call

    def watched(self: Any, inps: torch.Tensor, **options: Any) -> Any:
        lengths.append(inps.shape[1])
        return original(self, inps, **options)

    monkeypatch.setattr(HFLM, "_model_call", watched)
    request = make_request(folder, tmp_path, {"candidate": base}, {"quiz": gate_task(folder, "likelihood0")})
    card, _, _ = run(request)
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1
    assert [row.doc_id for row in card.rows] == list(range(24))


# --- Traps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate0", "choose0", "likelihood0"])
def test_an_adapter_of_nan_is_damage_not_a_wrong_answer(
    folder: Path, base: ModelSource, tmp_path: Path, name: str
) -> None:
    save_adapter(tmp_path / "nan", seed=0, fill=float("nan"))
    systems = {"base": base, "candidate": adapted(base, tmp_path / "nan")}
    with pytest.raises(ArtifactDamaged, match=f"candidate, {name}: the model's output is not finite"):
        run(make_request(folder, tmp_path, systems, {name: gate_task(folder, name)}))
    assert not (tmp_path / "scorecard.jsonl").exists()


def test_the_models_own_generation_settings_do_not_count(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    def load_stubborn(source: ModelSource, dtype: str) -> Any:
        model = load_model(source, dtype)
        model.generation_config.max_new_tokens = 2
        model.generation_config.repetition_penalty = 5.0
        model.generation_config.do_sample = True
        return model

    tasks = {"generate0": gate_task(folder, "generate0")}
    systems = two_systems(folder, base)
    plain, _, _ = run(make_request(folder, tmp_path / "a", systems, tasks))
    stubborn, _, _ = run(make_request(folder, tmp_path / "b", systems, tasks), CountingLoader(load_stubborn))
    assert [row.response for row in stubborn.rows] == [row.response for row in plain.rows]
    assert max(len(row.response) for row in plain.rows) == 12


def test_a_model_left_in_training_mode_is_evaluated_without_dropout(
    folder: Path, base: ModelSource, tmp_path: Path
) -> None:
    models: list[Any] = []

    def load_training(source: ModelSource, dtype: str) -> Any:
        models.append(load_model(source, dtype).train())
        models[-1].config.attention_dropout = 0.5
        return models[-1]

    tasks = {"likelihood0": gate_task(folder, "likelihood0")}
    systems = {"candidate": base}
    plain, _, _ = run(make_request(folder, tmp_path / "a", systems, tasks))
    trained, _, _ = run(make_request(folder, tmp_path / "b", systems, tasks), CountingLoader(load_training))
    assert [row.metrics for row in trained.rows] == [row.metrics for row in plain.rows]
    assert models[0].training
    assert models[0].model.layers[0].training


def test_random_states_are_left_as_they_were(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run(make_request(folder, tmp_path, {"candidate": base}, {"generate2": gate_task(folder, "generate2", limit=4)}))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_nothing_is_printed(
    folder: Path, base: ModelSource, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    tasks = {name: gate_task(folder, name) for name in ("generate2", "choose0", "likelihood0")}
    systems = two_systems(folder, base)
    capfd.readouterr()
    run(make_request(folder, tmp_path, systems, tasks))
    assert capfd.readouterr() == ("", "")


def test_an_error_gives_the_adapters_back(folder: Path, base: ModelSource) -> None:
    weights = SharedWeights(two_systems(folder, base), "float32", CountingLoader().loading())
    ids = torch.tensor([[10, 20, 30]])
    with weights.speaking_as("candidate") as model:
        adapted_logits = model(ids).logits
    with weights.speaking_as("base") as model:
        base_logits = model(ids).logits

    def fail_as_base() -> None:
        with weights.speaking_as("base"):
            raise KeyError

    with pytest.raises(KeyError):
        fail_as_base()
    assert not torch.equal(base_logits, adapted_logits)
    with weights.speaking_as("candidate") as model:
        assert isinstance(model, PeftModel)
        assert torch.equal(model(ids).logits, adapted_logits)


def test_systems_on_other_weights_are_loaded_one_after_the_other(
    folder: Path, base: ModelSource, tmp_path: Path
) -> None:
    other = replace(base, name="full", digest="other", model_digest="other")
    systems = {"base": base, "candidate": other, "parent": adapted(base, folder / "parent")}
    _, loader, log = run(make_request(folder, tmp_path, systems, {"choose0": gate_task(folder, "choose0")}))
    assert [source.model_digest for source in loader.loaded] == [base.model_digest, "other"]
    assert [source.adapter for source in loader.loaded] == [None, None]
    assert list(dict.fromkeys(step[0] for step in log.steps)) == ["base", "parent", "candidate"]


def test_progress_counts_documents(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    request = make_request(folder, tmp_path, {"candidate": base}, {"quiz": gate_task(folder, "choose0")}, batch_size=2)
    _, _, log = run(request)
    assert log.steps == [("candidate", "quiz", done, 24) for done in range(2, 26, 2)]


def test_prompts_that_do_not_fit_are_mentioned(folder: Path, tmp_path: Path) -> None:
    small = base_source(write_base(tmp_path / "small", max_position_embeddings=24))
    tasks = {"generate0": gate_task(folder, "generate0"), "choose2": gate_task(folder, "choose2")}
    _, _, log = run(make_request(folder, tmp_path, {"candidate": small}, tasks))
    assert [note.split(" did")[0] for note in log.notes] == ["24 prompts of generate0", "96 prompts of choose2"]


def test_a_task_that_generates_more_than_the_context_holds_is_rejected(folder: Path, tmp_path: Path) -> None:
    small = base_source(write_base(tmp_path / "small", max_position_embeddings=12))
    request = make_request(folder, tmp_path, {"candidate": small}, {"generate0": gate_task(folder, "generate0")})
    with pytest.raises(BadInput, match="may generate 12 tokens, but the model's context holds 12"):
        run(request)


def test_an_answer_that_is_longer_than_the_context_is_named(folder: Path, tmp_path: Path) -> None:
    small = base_source(write_base(tmp_path / "small", max_position_embeddings=2))
    request = make_request(folder, tmp_path, {"candidate": small}, {"choose2": gate_task(folder, "choose2")})
    with pytest.raises(
        BadInput, match=r"an answer has \d+ tokens, but the model's context holds 2\n.*Leave its document"
    ):
        run(request)


# --- Documents --------------------------------------------------------------------------------------------------------


def test_a_limit_takes_a_seeded_sample_not_the_first(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    def sample(seed: int) -> list[int]:
        tasks = {"quiz": gate_task(folder, "choose0", limit=6)}
        request = make_request(folder, tmp_path, two_systems(folder, base), tasks, seed=seed)
        card, _, _ = run(request)
        drawn = [[row.doc_id for row in rows_of(card, system)] for system in ("base", "candidate")]
        assert drawn[0] == drawn[1] == sorted(drawn[0])
        return drawn[0]

    assert sample(1) == sample(1) != sample(2)
    assert len(sample(1)) == 6
    assert sample(1) != list(range(6))


def test_chat_is_for_what_is_generated(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    def hashes(name: str, chat: bool | None) -> list[str]:
        request = make_request(
            folder, tmp_path, {"candidate": base}, {"quiz": gate_task(folder, name, limit=2, chat=chat)}
        )
        return [row.request_hash for row in run(request)[0].rows]

    assert hashes("generate2", None) == hashes("generate2", True) != hashes("generate2", False)
    assert hashes("choose2", None) == hashes("choose2", False) != hashes("choose2", True)


def test_the_filter_and_the_answer_are_in_the_rows(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    tasks = {"quiz": gate_task(folder, "generate0"), "pick": gate_task(folder, "choose0")}
    card, _, _ = run(make_request(folder, tmp_path, {"candidate": base}, tasks))
    quiz = [row for row in card.rows if row.task == "quiz"]
    assert {row.filter for row in quiz} == {"first", "whole"}
    data = [json.loads(line) for line in (folder / "data" / "quiz.jsonl").read_text().splitlines()]
    assert [row.target for row in quiz if row.filter == "first"] == [item["answer"] for item in data]
    for row in card.rows:
        if row.task == "pick":
            assert row.target == data[row.doc_id]["choices"][data[row.doc_id]["label"]]
            assert (row.response == row.target) == (row.metrics["acc"] == 1.0)
    assert card.higher_is_better == {"quiz": True, "pick": True}


def test_changed_data_is_read_anew(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "choose0.yaml").write_text((folder / "choose0.yaml").read_text())
    for split in ("quiz", "train"):
        (tmp_path / "data" / f"{split}.jsonl").write_text((folder / "data" / f"{split}.jsonl").read_text())
    task = gate_task(tmp_path, "choose0")
    assert len(list(load_leaves("quiz", task)[0].eval_docs)) == 24
    text = (folder / "data" / "quiz.jsonl").read_text()
    (tmp_path / "data" / "quiz.jsonl").write_text(text + text)
    assert len(list(load_leaves("quiz", task)[0].eval_docs)) == 48


# --- What is wrong with a task ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate0", "generate2"])
def test_documents_from_a_file_take_the_place_of_the_tasks_own(folder: Path, tmp_path: Path, name: str) -> None:
    rows = [quiz_row(random.Random(5), index) for index in range(6)]
    data = tmp_path / "held_out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = gate_task(folder, name, data=str(data))
    (leaf,) = load_leaves("quiz", task)
    assert [doc["question"] for doc in leaf.eval_docs] == [row["question"] for row in rows]
    examples = leaf.fewshot_docs()
    assert {doc["question"] for doc in examples} <= {row["question"] for row in rows}


def test_a_registered_task_reads_documents_from_a_file(tmp_path: Path) -> None:
    data = tmp_path / "maths.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "It is two.\n#### 2"}) + "\n")
    task = GateTask(role=Role.guard, metric="exact_match", filter="flexible-extract", data=str(data), num_fewshot=0)
    (leaf,) = load_leaves("gsm8k", task)
    assert [leaf.doc_to_target(doc) for doc in leaf.eval_docs] == ["It is two.\n#### 2"]


def test_two_tasks_that_ask_the_same_are_asked_once(
    folder: Path, base: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = HFLM.generate_until

    def counting(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        asked.append(len(requests))
        return original(self, requests, disable_tqdm=disable_tqdm)

    monkeypatch.setattr(HFLM, "generate_until", counting)
    twin = gate_task(folder, "generate0", filter="whole")
    tasks = {"one": gate_task(folder, "generate0"), "two": replace(twin, task=gate_task(folder, "generate0").task)}
    card, _, _ = run(make_request(folder, tmp_path, {"base": base, "candidate": base}, tasks))
    assert sum(asked) == len({row.doc_id for row in card.rows})  # base and candidate are one system here


def test_a_target_that_lm_eval_takes_for_a_list_is_rejected(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    data = tmp_path / "lists.jsonl"
    data.write_text(json.dumps({"question": "name two", "answer": "[1, 2]"}) + "\n")
    text = LIKELIHOOD.format(name="lists", shots=0)
    task_file = tmp_path / "lists.yaml"
    lines = [line for line in text.splitlines() if not line.startswith(("doc_to_target", "process_results"))]
    task_file.write_text("\n".join([*lines, 'doc_to_target: "{{answer}}"']).replace("data/quiz.jsonl", str(data)))
    task = GateTask(task=str(task_file), role=Role.lift, metric=METRICS["likelihood"])
    with pytest.raises(BadInput, match=r"lists: the target of document 0 is not text: \[1, 2\]"):
        run(make_request(folder, tmp_path, {"base": base, "candidate": base}, {"lists": task}))


def test_preflight_gathers_what_only_loading_shows(folder: Path, tmp_path: Path) -> None:
    text = (folder / "choose0.yaml").read_text()
    (tmp_path / "defaults.yaml").write_text(text.split("metric_list")[0].replace("data/", f"{folder}/data/"))
    (tmp_path / "lost.yaml").write_text(text.replace("data/quiz", f"{folder}/data/lost"))
    (tmp_path / "pooled.yaml").write_text(
        text.replace("data/", f"{folder}/data/").replace("metric: acc,", "metric: f1,").replace("mean", "f1", 1)
    )
    tasks = {
        name: GateTask(role=Role.lift, metric=metric, task=str(tmp_path / f"{name}.yaml"))
        for name, metric in (("defaults", "bleu"), ("lost", "acc"), ("pooled", "f1"))
    }
    with pytest.raises(BadInput) as caught:
        preflight(tasks)
    assert [problem.where for problem in caught.value.problems] == [
        "tasks.defaults.metric",
        "tasks.lost",
        "tasks.pooled.metric",
    ]
    assert "no metric bleu" in caught.value.problems[0].what
    assert "cannot load" in caught.value.problems[1].what
    assert "not a mean" in caught.value.problems[2].what


TASK_ON_FILES = """
task: quiz
dataset_path: json
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: [a, b]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean}]
"""


@pytest.mark.parametrize("arguments", ["", "dataset_kwargs: {}", "dataset_kwargs: {data_files: {}}"])
def test_a_task_on_files_that_names_none_does_not_take_those_of_the_working_folder(
    tmp_path: Path, arguments: str
) -> None:
    Path("other.json").write_text('{"question": "x", "answer": "y"}')
    path = tmp_path / "quiz.yaml"
    path.write_text(f"{TASK_ON_FILES}{arguments}\n")
    with pytest.raises(BadInput, match=r"quiz\.yaml: its dataset_path is json, and it names no file\s+Name it: data"):
        preflight({"quiz": GateTask(role=Role.lift, metric="acc", task=str(path))})


def test_the_plugin_scores_judges_and_checks(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    tasks = {"quiz": gate_task(folder, "choose0")}
    request = make_request(folder, tmp_path, two_systems(folder, base), tasks)
    card = plugin.evaluate_artifact(request, Log())
    assert {row.system for row in card.rows} == {"base", "candidate"}
    assert gate_plugin.judge_artifact(request, card) == judge(request, card)
    wrong = SimpleNamespace(
        name="sft", gate=request.gate, replay=None, tasks={"quiz": replace(tasks["quiz"], metric="ac")}
    )
    (problem,) = plugin.check_plan(SimpleNamespace(steps=(wrong,)))
    assert problem.where == "sft.gate.tasks.quiz.metric"


def test_a_gate_that_is_off_scores_nothing(folder: Path, base: ModelSource, tmp_path: Path) -> None:
    tasks = {"quiz": gate_task(folder, "choose0")}
    request = make_request(folder, tmp_path, two_systems(folder, base), tasks, enabled=False)
    assert run(request, CountingLoader(never_load))[0].rows == ()


def test_a_group_is_pooled(folder: Path, base: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a group's tasks are numbered one after the other, and sampled together."""
    tasks = tmp_path / "tasks"
    (tasks / "family").mkdir(parents=True)
    for name in ("choose0", "choose2"):
        text = (folder / f"{name}.yaml").read_text()
        (tasks / "family" / f"{name}.yaml").write_text(text.replace("data/", f"{folder}/data/"))
    (tasks / "family" / "both.yaml").write_text("group: both\ntask: [choose0, choose2]\n")
    monkeypatch.setattr("posttrain.scoring.harness.tasks.tasks_folder", lambda: tasks)
    monkeypatch.setattr(
        "posttrain.scoring.harness.tasks.registered_tasks", lambda: {"both": tasks / "family" / "both.yaml"}
    )
    both = GateTask(role=Role.lift, metric="acc")
    card, _, _ = run(make_request(folder, tmp_path, {"candidate": base}, {"both": both}))
    parts = {name: gate_task(folder, name) for name in ("choose0", "choose2")}
    single, _, _ = run(make_request(folder, tmp_path, {"candidate": base}, parts))
    assert [row.doc_id for row in card.rows] == list(range(48))
    assert [row.metrics for row in card.rows] == [row.metrics for row in single.rows]
    assert [row.request_hash for row in card.rows] == [row.request_hash for row in single.rows]
    (tasks / "family" / "more.yaml").write_text("group: more\ntask: [{task: elsewhere, num_fewshot: 3}]\n")
    index = TaskManager(include_defaults=False, include_path=str(tasks)).task_index
    assert (_is_complete("both", index), _is_complete("more", index)) == (True, False)
    limited, _, _ = run(make_request(folder, tmp_path, {"candidate": base}, {"both": replace(both, limit=20)}))
    assert {row.doc_id // 24 for row in limited.rows} == {0, 1}
    assert len(limited.rows) == 20


def test_what_the_module_of_a_task_writes_is_not_shown(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    work = copied_task(folder, tmp_path, "likelihood0")
    noise = "import sys\nprint('Downloaded')\nprint('no host', file=sys.stderr)\n"
    (work / "scoring.py").write_text(noise + SCORING)
    (leaf,) = load_leaves("quiz", gate_task(work, "likelihood0"))
    assert leaf.process_results({}, [(-1.0, True)]) == {"surprise": 1.0, "acc": 1.0}
    assert capfd.readouterr() == ("", "")
