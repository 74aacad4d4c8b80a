"""Rewards: what the shipped ones give, and that a faulty one is named whatever its fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from posttrain.data.questions import read_question
from posttrain.data.records import Question
from posttrain.errors import BadInput, PluginFailed
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.rewards.reward import Reward, Scorer, choose, read_weights
from posttrain.rewards.shipped import rewards

SHIPPED = {reward.name: reward for reward in rewards()}
OWNERS = dict.fromkeys(SHIPPED, "posttrain 1")


def question(**values: Any) -> Question:
    return read_question({"question": "How much?", **values}, "q.jsonl:1")


def parts(name: str, asked: Question, text: str, ended: bool = True) -> float:
    return choose(name, SHIPPED, OWNERS).parts(asked, text, ended)[name]


@pytest.mark.parametrize(
    ("name", "asked", "right", "wrong"),
    [
        ("exact", question(answer=["42", "forty-two"]), " forty-two\n", "forty-two."),
        ("contains", question(answer="42"), "It is 42.", "It is 41."),
        ("regex", question(answer=r"\b4\d\b", match="regex"), "about 47", "about 51"),
        ("numeric", question(answer=1200, match="numeric"), "so 7 and then 1,200", "1,200 and then 7"),
        ("json", question(answer={"a": 1}, match="json"), '```json\n{"a": 1}\n```', '{"a": true}'),
        ("json", question(), "[1]", "[1"),
        ("right", question(answer="42", match="contains"), "it is 42", "it is 4"),
        ("format", question(meta={"format": "<a>.*</a>"}), "<a>x\ny</a>", "<a>x</a> y"),
        ("length", question(meta={"max_characters": 4}), "four", "eightttt"),
        ("ended", question(), "", None),
    ],
)
def test_a_right_answer_gets_one_and_a_wrong_or_unended_one_nothing(
    name: str, asked: Question, right: str, wrong: str | None
) -> None:
    assert parts(name, asked, right) == 1.0
    assert wrong is None or parts(name, asked, wrong) == 0.0
    assert parts(name, asked, right, ended=False) == 0.0


def test_length_falls_between_the_limit_and_twice_it() -> None:
    assert parts("length", question(meta={"max_characters": 10}), "x" * 15) == 0.5


@pytest.mark.parametrize(
    ("name", "asked", "what"),
    [
        ("exact", question(), "has no answer"),
        ("right", question(), "has no answer"),
        ("numeric", question(answer="many"), "has the answer 'many', not one to look for by numeric"),
        ("regex", question(answer="("), "has the answer '('"),
        ("length", question(meta={"max_characters": 0}), "has no meta.max_characters above 0"),
        ("format", question(meta={"format": "("}), "has no pattern in meta.format"),
    ],
)
def test_a_question_without_what_a_reward_needs_is_named(name: str, asked: Question, what: str) -> None:
    (problem,) = choose(name, SHIPPED, OWNERS).problems([asked])
    assert problem.where == "q.jsonl:1"
    assert what in problem.what
    assert name in problem.what


def raises(asked: Question, text: str, ended: bool) -> float:
    raise KeyError("target")


def leaves(asked: Question, text: str, ended: bool) -> float:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("score", "what"),
    [
        (raises, "KeyError: 'target'"),
        (leaves, "SystemExit: 0"),
        (lambda *_: math.nan, "it gave nan for 'an answer', not one finite number"),
        (lambda *_: math.inf, "it gave inf"),
        (lambda *_: None, "it gave None"),
        (lambda *_: [1.0, 0.0], r"it gave \[1.0, 0.0\]"),
        (lambda *_: "1", "it gave '1'"),
    ],
)
def test_a_faulty_reward_is_named_with_its_question(score: Callable[..., Any], what: str) -> None:
    faulty = Reward(name="mine", summary="", version=1, score=score)
    scorer = Scorer(rewards=[faulty], weights=[1.0], owners={"mine": "plugin mine (mine 0.1)"})
    with pytest.raises(PluginFailed, match=rf"reward mine of plugin mine \(mine 0.1\) at q.jsonl:1: {what}"):
        scorer.parts(question(), "an answer", True)


def test_rewards_add_up_by_their_weights() -> None:
    scorer = choose({"exact": 1.0, "ended": -0.25}, SHIPPED, OWNERS)
    assert scorer.total(scorer.parts(question(answer="x"), "x", True)) == 0.75


@pytest.mark.parametrize(
    "given", [{}, [], ["exact", "exact"], {"exact": "much"}, {"exact": math.nan}, 3, {"exact": True}]
)
def test_settings_that_name_no_reward_are_rejected(given: Any) -> None:
    with pytest.raises(ValueError, match=r"neither|twice|weight"):
        read_weights(given)


def test_an_unknown_reward_is_named_with_its_neighbour() -> None:
    with pytest.raises(ValueError, match="Did you mean exact"):
        choose("exakt", SHIPPED, OWNERS)


def loaded(monkeypatch: pytest.MonkeyPatch, *found: Any) -> plugins.Host:
    module = ModuleType("mine_rewards")
    vars(module)["register_rewards"] = hookimpl(lambda: list(found))
    monkeypatch.setitem(__import__("sys").modules, "mine_rewards", module)
    return plugins.load([EntryPoint(name="mine", value="mine_rewards", group="posttrain")])


def test_a_plugins_reward_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    host = loaded(monkeypatch, Reward(name="mine", summary="", version=1, score=raises))
    assert host.reward_owners["mine"] == "mine (mine_rewards)"
    with pytest.raises(PluginFailed, match=r"plugin mine .* in reward mine: KeyError: 'target'"):
        choose("mine", host.rewards, host.reward_owners).parts(question(), "an answer", True)


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        (Reward(name="exact", summary="", version=1, score=raises), "already registered by posttrain"),
        (Reward(name="My Own", summary="", version=1, score=raises), "cannot be the name of a reward"),
        (Reward(name="mine", summary="", version=True, score=raises), "must be a whole number"),
        (raises, "must return Reward objects"),
    ],
)
def test_an_unusable_reward_leaves_its_plugin_out(monkeypatch: pytest.MonkeyPatch, reward: Any, what: str) -> None:
    host = loaded(monkeypatch, reward)
    assert what in host.plugins["mine"].reason
    assert "mine" not in host.rewards


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "a", "anser": "b"}, "has no 'anser'"),
        ({"question": "a", "messages": []}, "needs either question or messages"),
        ({"prompt": "a", "completion": "b", "answer": "b"}, "an answer and a completion"),
        ({"question": "a", "meta": "b"}, "meta must be an object"),
        ({"question": "a", "answer": []}, "has no answer"),
        ({"question": "a", "answer": 4}, "cannot look for the answer 4"),
    ],
)
def test_unusable_rows_are_rejected_with_their_place(row: dict[str, Any], what: str) -> None:
    with pytest.raises(BadInput, match=what) as caught:
        read_question(row, "q.jsonl:7")
    assert caught.value.problems[0].where == "q.jsonl:7"


def test_a_prompt_with_its_completion_is_a_question_with_its_answer() -> None:
    said = [{"role": "assistant", "content": "b"}]
    for completion in ("b", said):
        found = read_question({"prompt": "a", "completion": completion}, "q.jsonl:1")
        assert (found.prompt, found.answers) == (({"role": "user", "content": "a"},), ("b",))
