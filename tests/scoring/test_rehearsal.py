"""What would keep a gate from its scores is found before training; what still fails while scoring names its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nltk
import pytest
from rich.console import Console

from posttrain.artifact import ModelSource
from posttrain.config.schema import GateConfig, GateTask, Role
from posttrain.errors import BadInput
from posttrain.gate.spec import DocumentScore, GateRequest
from posttrain.host.plugins import CORE_ORIGIN
from posttrain.model.loading import load_model, load_tokenizer
from posttrain.run import display
from posttrain.run.judge import check_gates
from posttrain.scoring import plugin
from posttrain.scoring.evaluate import evaluate
from posttrain.scoring.harness import responder
from posttrain.scoring.harness.rehearsal import INVENTED
from posttrain.scoring.harness.requests import sample_documents
from posttrain.scoring.systems import Loading
from tests.support.adapters import Log
from tests.support.quizzes import gate_task, write_quizzes
from tests.support.tiny import base_source, write_base

TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
process_results: !function own.scored
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
"""
SOUND = "def scored(doc, results):\n    return {'right': float(doc['answer'] in results[0])}\n"
MEND = "Mend the task's functions"
OWN = GateTask(task="own.yaml", role=Role.lift, metric="right")
NLTK = "LookupError('''\n****\n  Resource \\x1b[93mpunkt_tab\\x1b[0m not found.\n  Please use the NLTK Downloader\n''')"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return base_source(write_base(tmp_path_factory.mktemp("rehearsal") / "base"))


def write(function: str, count: int = 12, task: str = TASK) -> None:
    Path("own.py").write_text(function)
    Path("own.yaml").write_text(task)
    rows = [{"question": f"{index}?", "answer": "ab"[index % 2]} for index in range(count)]
    Path("own.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def check(task: GateTask = OWN, name: str = "mine") -> list[Any]:
    """Return the problems that a run finds before it trains."""
    step: Any = SimpleNamespace(name="sft", gate=GateConfig(), replay=None, tasks={name: task})
    return list(plugin.check_gate(step))


def raising(condition: str, error: str) -> str:
    return f"def scored(doc, results):\n    if {condition}:\n        raise {error}\n    return {{'right': 1.0}}\n"


@pytest.mark.parametrize(
    ("function", "what", "fix"),
    [
        (raising("results[0] == ''", "IndexError('no words')"), "an empty answer|IndexError: no words", MEND),
        (raising("len(results[0]) > 5000", "RecursionError"), "a long answer|RecursionError: no message", MEND),
        (raising("len(results[0]) < 5", "ValueError('short')"), "an empty answer|ValueError: short", MEND),
        (raising("not results[0].isascii()", "UnicodeError('é')"), "several sentences|UnicodeError: é", MEND),
        (raising("results[0].count('.') > 1", NLTK), "punkt_tab", "python -m nltk.downloader punkt_tab"),
        ("def scored(doc, results):\n    import absent_module.part\n", "No module named", "pip install absent_module"),
        (
            raising("True", "ImportError(\"To use it, run 'pip install sacrebleu rouge-score' first\")"),
            "ImportError", "pip install sacrebleu rouge-score",
        ),
        (raising("doc['question'] == '11?'", "KeyError('11')"), "document 11|KeyError", MEND),
        (raising("True", "ConnectionError('no host')"), "ConnectionError: no host", MEND),
        ("def scored(doc, results):\n    return {'right': float('nan')}\n", "right is not a finite number", ""),
        ("def scored(doc, results):\n    return {'rihgt': 1.0}\n", "no number for right", ""),
        ("def scored(doc, results):\n    return None\n", "AttributeError", MEND),
    ],
)  # fmt: skip
def test_what_fails_on_an_invented_answer_is_named_with_its_cure(function: str, what: str, fix: str) -> None:
    write(function)
    problem, *_ = check()
    assert problem.where.startswith("sft.gate.tasks.mine, document ")
    assert all(part in str(problem) for part in what.split("|"))
    assert fix in problem.fix
    assert "\x1b" not in str(problem)


def test_every_different_problem_is_listed_once() -> None:
    write(
        "def scored(doc, results):\n"
        "    if not results[0]:\n        raise ValueError('empty')\n"
        "    if len(results[0]) > 5000:\n        raise ValueError('long')\n"
        "    return {'right': 1.0}\n"
    )
    assert [problem.what.rpartition(" ")[2] for problem in check()] == ["empty", "long"]


def test_sound_tasks_of_every_kind_have_no_problem(tmp_path: Path) -> None:
    folder = write_quizzes(tmp_path / "quizzes") if (tmp_path / "quizzes").mkdir() is None else tmp_path
    write(SOUND)
    assert check() == []
    for name in ("generate0", "generate2", "choose0", "choose2", "likelihood0"):
        assert check(gate_task(folder, name)) == []
    (own,) = plugin.register_eval_tasks()
    Path("p.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    for name, metric in (("held_out_responses", "bits_per_byte"), ("held_out_preferences", "acc_norm")):
        data = "p.jsonl"
        if name == "held_out_responses":
            data = "r.jsonl"
            Path(data).write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
        task = GateTask(role=Role.lift, metric=metric, task=str(own / f"{name}.yaml"), data=data, chat=True)
        assert check(task) == []


@pytest.mark.parametrize("kind", ["loglikelihood", "multiple_choice", "loglikelihood_rolling"])
def test_functions_that_score_likelihoods_are_tried(kind: str) -> None:
    lines = TASK.replace("generate_until", kind).splitlines()
    lines = [line for line in lines if not line.startswith("generation")]
    choices = "\ndoc_to_choice: [a, b]\n" if kind == "multiple_choice" else "\n"
    write("def scored(doc, results):\n    raise ValueError('broken')\n", task="\n".join(lines) + choices)
    (problem,) = check()
    assert "ValueError: broken" in problem.what


def test_a_filter_that_fails_is_named() -> None:
    filters = "filter_list: [{name: one, filter: [{function: regex, regex_pattern: '(a)', group_select: 999999}]}]\n"
    write(SOUND, task=TASK + filters)
    (problem, *_) = check()
    assert "the task cannot be scored" in problem.what


@pytest.mark.parametrize("place", [0, 40])
def test_ifeval_without_its_sentence_tokenizer_is_found_before_training(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the document stands that needs it."""
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *words: False)
    lower = {"prompt": "a", "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
    three = {"relation": "at least", "num_sentences": 3}
    counted = {"prompt": "b", "instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [three]}
    rows = [counted if index == place else lower for index in range(place + 2)]
    Path("ifeval.jsonl").write_text("".join(json.dumps({"key": key, **row}) + "\n" for key, row in enumerate(rows)))
    task = GateTask(role=Role.lift, metric="prompt_level_strict_acc", data="ifeval.jsonl")
    (problem,) = check(task, "ifeval")
    assert problem.where == f"sft.gate.tasks.ifeval, document {place}, an answer of several sentences"
    assert "Resource punkt_tab not found" in problem.what.replace("'", "")
    assert problem.fix == "python -m nltk.downloader punkt_tab"


def test_a_module_that_a_task_imports_is_named_with_its_cure() -> None:
    write("import absent_module\n" + SOUND)
    (problem,) = check()
    assert problem.fix == "pip install absent_module"


def test_too_few_examples_are_found_before_training() -> None:
    write(SOUND, count=5)
    assert check(replace(OWN, num_fewshot=4)) == []
    (problem,) = check(replace(OWN, num_fewshot=5))
    assert problem.where == "sft.gate.tasks.mine.num_fewshot"


def job_of(task: GateTask, base: ModelSource) -> Any:
    """Return what a start looks at of a stage with one task."""
    host = SimpleNamespace(
        hook=SimpleNamespace(check_gate=lambda step: [plugin.check_gate(step)]), answerers=lambda hook: [CORE_ORIGIN]
    )
    step = SimpleNamespace(name="sft", gate=GateConfig(), replay=None, tasks={"mine": task})
    return SimpleNamespace(name="sft", folder=Path("none"), host=host, step=step, base=base)


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_that_the_template_cannot_render_is_found_before_training(base: ModelSource, chat: bool) -> None:
    """Only where it is asked in a chat."""
    (own,) = plugin.register_eval_tasks()
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b<|end|><|user|>c"}]
    Path("r.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    path = str(own / "held_out_responses.yaml")
    task = GateTask(role=Role.lift, metric="bits_per_byte", task=path, data="r.jsonl", chat=chat)
    job = job_of(task, base)
    if not chat:
        check_gates([job])
        return
    with pytest.raises(BadInput, match="holds the special token") as caught:
        check_gates([job])
    assert [problem.where for problem in caught.value.problems] == ["sft.gate.tasks.mine, document 1"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A model whose context holds 40 tokens, which are characters."""
    return base_source(write_base(tmp_path_factory.mktemp("short") / "base", max_position_embeddings=40))


@pytest.mark.parametrize(
    ("kind", "metric", "row"),
    [
        ("held_out_responses", "bits_per_byte", {"prompt": "a", "completion": "{}"}),
        ("held_out_preferences", "acc_norm", {"prompt": "a", "chosen": "b", "rejected": "{}"}),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_longer_than_the_context_is_found_before_training(
    short: ModelSource, kind: str, metric: str, row: dict[str, str], chat: bool
) -> None:
    (own,) = plugin.register_eval_tasks()
    end = 0 if chat else 2  # lm_eval gives the answer the lines that end the prompt

    def write_rows(*lengths: int) -> GateTask:
        rows = [{key: text.format("b" * length) for key, text in row.items()} for length in lengths]
        Path("r.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        return GateTask(role=Role.lift, metric=metric, task=str(own / f"{kind}.yaml"), data="r.jsonl", chat=chat)

    check_gates([job_of(write_rows(5, 40 - end), short)])
    task = write_rows(5, 41 - end, 99)
    with pytest.raises(BadInput) as caught:
        check_gates([job_of(task, short)])
    (problem,) = caught.value.problems
    assert problem.where.startswith("sft.gate.tasks.mine, ")
    assert "r.jsonl:2" in problem.where
    assert problem.what == "an answer has 41 tokens, but the model's context holds 40"
    assert "Leave its document out" in problem.fix
    with pytest.raises(BadInput, match=r"an answer has \d+ tokens, but the model's context holds 40"):
        scores(short, task=task)  # as scoring says it
    (asked,) = sample_documents(3, 1, GateConfig().seed)
    lengths = [99, 99, 99]
    lengths[asked] = 5
    check_gates([job_of(replace(write_rows(*lengths), limit=1), short)])  # those that are not asked may be longer


def test_a_task_that_generates_more_than_the_context_holds_is_found_before_training(short: ModelSource) -> None:
    (own,) = plugin.register_eval_tasks()
    Path("q.jsonl").write_text(json.dumps({"question": "a?", "answer": "b"}) + "\n")
    task = GateTask(role=Role.lift, metric="right", task=str(own / "own_questions.yaml"), data="q.jsonl")
    with pytest.raises(BadInput, match=r"the task may generate \d+ tokens, but the model's context holds 40"):
        check_gates([job_of(task, short)])


# --- While scoring ----------------------------------------------------------------------------------------------------


def scores(
    base: ModelSource, load: Any = load_model, log: Log | None = None, task: GateTask | None = None
) -> list[DocumentScore]:
    request = GateRequest(
        stage="sft", gate=GateConfig(batch_size=4), tasks={"mine": task or OWN}, systems={"candidate": base},
        dtype="float32", cache=Path("cache"), scorecard=Path("scorecard.jsonl"),
    )  # fmt: skip
    return list(evaluate(request, log or Log(), Loading(load, load_tokenizer, "cpu")).rows)


def never_load(source: ModelSource, dtype: str) -> Any:
    raise AssertionError("a model was loaded")


def test_a_gate_of_an_existing_adapter_asks_nothing_that_it_cannot_score(base: ModelSource) -> None:
    write(raising("not results[0]", "IndexError('no words')"))
    with pytest.raises(BadInput, match=r"tasks.mine, document 0, an empty answer: .*IndexError: no words"):
        scores(base, never_load)


@pytest.mark.parametrize("part", ["process_results", "filter"])
def test_what_fails_while_scoring_names_the_document_and_keeps_the_answers(base: ModelSource, part: str) -> None:
    invented = f"INVENTED = {list(INVENTED.values())!r}\n"
    broken = raising("results[0] not in INVENTED and doc['question'] == '7?'", "ZeroDivisionError('odd')")
    task = TASK
    if part == "filter":
        broken = SOUND + (
            "class Odd:\n"
            "    def apply(self, resps, docs):\n"
            "        for given, doc in zip(resps, docs):\n"
            "            if given[0] not in INVENTED and doc['question'] == '7?':\n"
            "                raise ZeroDivisionError('odd')\n"
            "        return [given[0] for given in resps]\n"
        )
        filters = "filter_list: [{name: odd, filter: [{function: custom, filter_fn: !function own.odd}]}]\n"
        broken += "def odd(resps, docs):\n    return Odd().apply(resps, docs)\n"
        task = TASK + filters
    write(invented + broken, task=task)
    for load in (load_model, never_load):  # the next try answers nothing again
        with pytest.raises(BadInput, match=r"candidate, mine, document 7: .*ZeroDivisionError: odd"):
            scores(base, load)
    write(SOUND)
    assert len(scores(base, never_load)) == 12


def test_long_batches_report_their_tokens_and_answer_the_same(
    base: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(SOUND)
    plain, log = scores(base), Log()
    assert log.tokens == []
    monkeypatch.setattr(responder, "REPORT_SECONDS", 0.0)
    for kept in Path("cache").iterdir():
        kept.unlink()
    assert scores(base, log=log) == plain
    assert [step[2] for step in log.steps] == [4, 8, 12]
    assert {step[2] for step in log.tokens} == {0, 4, 8}
    assert [step[4] for step in log.tokens if step[2] == 4] == [4, 8, 12, 16, 20, 24]  # four answers of six tokens


def test_tokens_of_a_long_batch_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_SECONDS", 0)
    monkeypatch.setattr(display, "LONG_STEP_SECONDS", 0)
    with Path("out").open("w+") as out:
        shown = display.EvaluationProgress(display.Display(Console(file=out, width=120)), "sft")
        shown.advance("base", "ifeval", 0, 541, 12_345)
        shown.advance("base", "ifeval", 16, 541)
        shown.stop()
        out.seek(0)
        text = out.read()
    assert "12,345 tokens" in text
    assert "ifeval base" in text
