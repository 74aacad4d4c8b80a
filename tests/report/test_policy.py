"""What the report says of an on-policy stage: reward beside gate, the answers with the highest reward, and advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain import report
from posttrain.gate.spec import Verdict
from posttrain.report.policy import advise, report_policy
from posttrain.report.run import read_report
from tests.support.fakes import Script, only_run, run_recipe, write_project
from tests.support.pages import read_page

HOSTILE = '</pre><script>alert("1")</script>'
FIGURES = {
    "reward_first": 0.1, "reward_last": 0.6, "reward_rose": True, "reward_error": 0.05,
    "eval_reward_first": 0.2, "eval_reward": 0.5, "eval_reward_highest": 0.55,
    "eval_reward_highest_step": 2, "eval_questions": 40, "eval_right_first": 0.5, "eval_right": 0.45,
    "gate_sample": {
        "facts": {"metric": "acc", "role": "lift", "documents": 64, "first": 0.25, "last": 0.5},
        "torn": {"metric": "acc", "first": None},
    },
}  # fmt: skip


@pytest.fixture
def run(working_folder: Path) -> Path:
    """A run whose stage dpo has the metrics of one on policy, and three samplings in its trail."""
    write_project(working_folder)
    script = Script()
    script.during_training = lambda context: context.metrics.update(FIGURES if context.name == "dpo" else {})
    run_recipe(script)
    path = only_run()
    rows: list[dict[str, Any]] = [{"stage": "dpo", "step": 0, "eval_reward": 0.2}]
    for step in (1, 2, 3):
        figures = {
            "reward": step / 5,
            "eval_reward": step / 4,
            "eval_right": 0.5,
            "eval_gate_facts": step / 8,
            "eval_gate_bits": 1.5,
            "entropy": 1.0,
            "kl": 0.1,
            "clipped": 0.0,
        }
        rows.append(
            {"stage": "dpo", "step": step, "loss": 0.1, "answer_tokens": 20.0 - step, "cut": 0.5 / step, **figures}
        )
        answers = [("same", 1.0), (f"best {step}", 2.0 if step == 2 else 1.5), (HOSTILE, 0.1)]
        trail(path, step, answers)
    with (path / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def trail(run: Path, step: int, answers: list[tuple[str, float]]) -> None:
    folder = run / "stages" / "dpo" / "answers"
    folder.mkdir(exist_ok=True)
    lines = [
        {"where": "q.jsonl:1", "question": "a red", "answer": text, "ended": True, "tokens": 2, "reward": reward}
        for text, reward in answers
    ]
    (folder / f"step-{step:08d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "torn by a ki")


def test_different_answers_are_shown_by_reward_the_latest_first(run: Path) -> None:
    found = read_report(run)
    policy = report_policy(found, found.stages[1])
    assert policy is not None
    assert [(each.answer, each.step, each.reward) for each in policy.answers] == [
        ("best 2", 2, 2.0), ("best 3", 3, 1.5), ("best 1", 1, 1.5), ("same", 3, 1.0), (HOSTILE, 3, 0.1),
    ]  # fmt: skip
    assert [chart.title for chart in policy.charts] == [
        "reward and eval_reward and eval_right and eval_gate_facts", "eval_gate_bits",
        "entropy", "kl", "clipped", "answer_tokens", "cut",
    ]  # fmt: skip
    courses = {each.name: (each.before, each.after) for each in policy.courses}
    assert courses["reward of sampled answers"] == ("0.100", "0.600")
    assert courses["entropy of a sampled token, nats"] == ("1.000", "1.000")
    assert courses["KL divergence from the parent, nats a token"] == ("0.1000", "0.1000")
    assert courses["reward of greedy answers to questions set aside"] == ("0.200", "0.500")
    assert courses["right greedy answers to questions set aside"] == ("50.0%", "45.0%")
    assert courses["sampled answers that never ended"] == ("50.0%", "16.7%")
    assert courses["tokens of a sampled answer"] == ("19.0", "17.0")
    assert courses["gate's sample: facts, acc"] == ("25.0", "50.0")
    assert not any("torn" in name for name in courses)
    assert courses["gate: some, acc"] == ("10.0", "60.0")
    assert report_policy(found, found.stages[0]) is None


def test_a_task_of_the_gate_has_the_state_of_every_comparison(run: Path) -> None:
    found = read_report(run)
    verdict = found.stages[1].verdict
    assert verdict is not None
    (task,) = verdict.tasks
    tasks = (task, replace(task, against="parent", state="fail"))
    policy = report_policy(found, replace(found.stages[1], verdict=replace(verdict, tasks=tasks)))
    assert policy is not None
    (note,) = [each.note for each in policy.courses if each.name == "gate: some, acc"]
    assert note == "lift, pass against base, fail against parent"


def test_the_page_shows_them_and_nothing_in_them_acts(run: Path) -> None:
    report.write(run)
    page = read_page((run / "report.html").read_text())
    for text in ("Reward against gate", "n 40, highest 0.550 at step 2", "step 2 · reward 2", HOSTILE, "q.jsonl:1"):
        assert text in page.words
    assert not page.all("script")


def test_markdown_has_reward_entropy_and_divergence_of_an_on_policy_stage_alone(run: Path) -> None:
    report.write(run)
    lines = (run / "report.md").read_text().splitlines()
    for line in (
        "| reward of sampled answers | 0.100 | 0.600 | the first and the last tenth of the steps, +0.500 ± 0.050 |",
        "| reward of greedy answers to questions set aside | 0.200 | 0.500 | n 40, highest 0.550 at step 2 |",
        "| right greedy answers to questions set aside | 50.0% | 45.0% | by a question's own match; no gate asks it |",
        "| entropy of a sampled token, nats | 1.000 | 1.000 |  |",
        "| KL divergence from the parent, nats a token | 0.1000 | 0.1000 |  |",
        "| gate's sample: facts, acc | 25.0 | 50.0 | lift, n 64, asked while training |",
    ):
        assert f"| dpo {line}" in lines
    metrics = run / "metrics.jsonl"
    metrics.write_text("")
    report.write(run)
    assert "on policy" not in (run / "report.md").read_text()


def test_without_its_trail_the_page_says_so(run: Path) -> None:
    for path in (run / "stages" / "dpo" / "answers").iterdir():
        path.unlink()
    report.write(run)
    words = read_page((run / "report.html").read_text()).words
    assert "Not in this report: the sampled answers: this run has none in answers/" in words


@pytest.mark.parametrize(("state", "rose", "told"), [
    ("fail", True, True), ("undecided", True, True), ("pass", True, False), ("fail", False, False),
])  # fmt: skip
def test_a_reward_that_the_gate_does_not_follow_is_named(state: Any, rose: bool, told: bool) -> None:
    verdict = Verdict(state=state, gated=True, tasks=(), reason="")
    found = advise({"reward_first": 0.1, "reward_last": 0.4, "reward_rose": rose}, verdict)
    assert bool(found) is told
    assert not told or "the reward rose from 0.100 to 0.400, and the gate did not follow" in found[0]
    assert advise({}, verdict) == advise({"reward_first": "a", "reward_last": 1, "reward_rose": True}, verdict) == []
