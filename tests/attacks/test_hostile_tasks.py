"""Task files of a stranger: their patterns end in time, and the task and the document are named."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.schema import GateTask, Role
from posttrain.errors import BadInput
from posttrain.host.time_limit import time_limit
from posttrain.scoring import checks
from posttrain.scoring.checks import check_tasks
from posttrain.scoring.harness import rehearsal
from posttrain.scoring.harness.rehearsal import rehearse_task
from posttrain.scoring.harness.requests import prepare_first
from posttrain.scoring.harness.scoring import apply_filters, measure
from posttrain.scoring.harness.tasks import load_leaves

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: own.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 6, do_sample: false}}
filter_list:
  - name: mine
    filter: [{{function: regex, regex_pattern: '{found}'}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: ['{ignored}']}}
"""
SLOW = "(a+)+c"
PLAIN = "[ab]"
HARD, EASY = "a" * 60, "b"
"""Answers: SLOW takes years for the first."""
MINE = GateTask(task="own.yaml", role=Role.lift, metric="exact_match")
LATE = "its patterns or functions take more than"


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SECONDS", 0.3)
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)


def prepared(found: str, ignored: str) -> Any:
    Path("own.yaml").write_text(TASK.format(found=found, ignored=ignored))
    Path("own.jsonl").write_text("".join(json.dumps({"question": f"{n}?", "answer": "a"}) + "\n" for n in range(8)))
    return prepare_first("mine", MINE, load_leaves("mine", MINE), 8, 8)


def answered(task: Any) -> Any:
    """The task with an answer for each of its documents, of which the sixth is the hard one."""
    for question in task.questions:
        question.requests[0].resps = [HARD if question.doc_id == 5 else EASY]
    return task


def test_a_slow_pattern_of_a_filter_is_named_with_its_document() -> None:
    task = answered(prepared(SLOW, PLAIN))
    with pytest.raises(BadInput) as caught:
        apply_filters(task.leaves[0], task.questions, "candidate, mine")
    (problem,) = caught.value.problems
    assert problem.where == "candidate, mine, document 5"
    assert LATE in problem.what


def test_a_slow_pattern_of_a_metric_is_named_with_its_document() -> None:
    task = answered(prepared(".*", SLOW))
    apply_filters(task.leaves[0], task.questions, "candidate, mine")
    measure(task, task.questions[4], "mine", "candidate, mine, document 4")
    with pytest.raises(BadInput) as caught:
        measure(task, task.questions[5], "mine", "candidate, mine, document 5")
    (problem,) = caught.value.problems
    assert problem.where == "candidate, mine, document 5"
    assert LATE in problem.what


@pytest.mark.parametrize(("found", "ignored"), [(r"(\w*\W*)*X", PLAIN), (".*", r"(\w*\W*)*X")])
def test_a_slow_pattern_is_found_before_training(found: str, ignored: str) -> None:
    with pytest.raises(BadInput) as caught:
        rehearse_task(prepared(found, ignored))
    assert caught.value.problems[0].where.startswith("tasks.mine, document 0, ")
    assert LATE in caught.value.problems[0].what


@pytest.mark.parametrize(
    ("found", "ignored"), [("(?i)" + r"[\0-\U0010ffff]" * 900, PLAIN), (".*", "(?i)" + r"[\0-\U0010ffff]" * 900)]
)
def test_a_pattern_that_takes_long_to_be_read_is_named(found: str, ignored: str) -> None:
    Path("own.jsonl").write_text("{}\n")
    Path("own.yaml").write_text(TASK.format(found=found, ignored=ignored))
    (problem,) = check_tasks({"mine": MINE})
    assert problem.where == "tasks.mine.task"
    assert "in own.yaml takes more than 0.3 s of computing to be read" in problem.what


def test_what_is_no_pattern_is_named() -> None:
    Path("own.jsonl").write_text("{}\n")
    Path("own.yaml").write_text(TASK.format(found="(", ignored=PLAIN))
    (problem,) = check_tasks({"mine": MINE})
    assert "the pattern '(' in own.yaml is no regular expression" in problem.what


def test_an_inner_limit_leaves_the_outer_one_in_force() -> None:
    passed: list[int] = []
    with pytest.raises(TimeoutError), time_limit(0.5):
        count(passed)
    assert len(passed) > 1
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


class Slow:
    """An object whose end takes longer than a limit."""

    def __del__(self) -> None:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass


def test_a_limit_that_passes_while_an_object_ends_holds_right_after() -> None:
    begun = time.process_time()
    with pytest.raises(TimeoutError), time_limit(0.1):
        end_slowly()
    assert 0.3 <= time.process_time() - begun < 0.6  # what a finalizer raises is a warning, and so an error here


def end_slowly() -> None:
    """Let an object end, then compute without end."""
    Slow()
    count([])


def count(passed: list[int]) -> None:
    """Compute without end, in short limits of its own."""
    while True:
        with time_limit(60):
            passed.append(sum(range(10_000)))
