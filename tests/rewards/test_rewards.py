"""Rewards: what the shipped ones give, and that a faulty one is named whatever its fault."""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest

from posttrain.config.ranges import number
from posttrain.data.questions import read_question
from posttrain.data.records import Question
from posttrain.errors import BadInput, PluginFailed
from posttrain.hookspecs import hookimpl
from posttrain.host import plugins
from posttrain.rewards.matching import Undecided
from posttrain.rewards.reward import NOTE_BYTES, Attempt, Reward, Score
from posttrain.rewards.scorer import Scorer, choose, count_notes, read_choice
from posttrain.rewards.shipped import rewards
from posttrain.scoring.tasks.metrics import right

SHIPPED = {reward.name: reward for reward in rewards()}
OWNERS = dict.fromkeys(SHIPPED, "posttrain 1")


def question(**values: Any) -> Question:
    return read_question({"question": "How much?", **values}, "q.jsonl:1")


def attempt(text: str = "an answer", **values: Any) -> Attempt:
    return Attempt(question=question(**values), text=text, ended=True)


def parts(name: str, asked: Question, text: str, ended: bool = True) -> float:
    (found,) = choose(name, SHIPPED, OWNERS).rate([Attempt(question=asked, text=text, ended=ended)])
    return found.parts[name]


@pytest.mark.parametrize(
    ("name", "asked", "right", "wrong"),
    [
        ("exact", question(answer=["42", "forty-two"]), " forty-two\n", "forty-two."),
        ("contains", question(answer="42"), "It is 42.", "It is 41."),
        ("regex", question(answer=r"\b4\d\b", match="regex"), "about 47", "about 51"),
        ("numeric", question(answer=1200, match="numeric"), "so 7 and then 1,200", "1,200 and then 7"),
        ("json", question(answer={"a": 1}, match="json"), '```json\n{"a": 1}\n```', '{"a": true}'),
        ("json", question(), "[1]", "[1"),
        ("json", question(), '"NaN"', "[NaN]"),
        ("json", question(), "[1e5]", "-Infinity"),
        ("json", question(answer=math.inf, match="json"), "1e999", "Infinity"),
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


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("regex", question(answer=r"^(a+)+$", match="regex")),
        ("right", question(answer=r"^(a+)+$", match="regex")),
        ("format", question(meta={"format": r"(a+)+"})),
    ],
)
def test_a_pattern_that_never_ends_is_named_and_the_answer_has_no_score(name: str, asked: Question) -> None:
    (found,) = choose(name, SHIPPED, OWNERS).rate([Attempt(question=asked, text="a" * 60 + "b", ended=True)])
    assert found.reward is None
    assert found.notes == {name: "the pattern takes more than 1 s of computing"}
    assert parts(name, asked, "aaa") == 1.0


def test_a_gates_metric_names_the_pattern_that_never_ends() -> None:
    document = {"answer": json.dumps([r"^(a+)+$"]), "match": "regex"}
    with pytest.raises(Undecided, match=r"the pattern .* takes more than 1 s of computing on one text"):
        right(document, ["a" * 60 + "b"])


@pytest.mark.parametrize(
    ("answer", "text", "is_one"),
    [
        ("1,200", "so 1200", True), (1200, "1,200.0", True), (-5, "so −5", True), ("−5", "it is -5.", True),
        (50, "50%", True), (3, "3 km", True), (0.5, "1/2", False), (1e-3, "1.0e-3", True), (0, "zero", False),
        (2, "1.", False), (7, "a7b", True),
    ],
)  # fmt: skip
def test_a_number_is_read_with_its_sign_and_commas_and_without_its_unit(answer: Any, text: str, is_one: bool) -> None:
    assert parts("numeric", question(answer=answer, match="numeric"), text) == float(is_one)


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


def raises(asked: Any, text: Any, ended: Any) -> float:
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
        (lambda *_: 10**5000, "it gave an object of the type int for 'an answer'"),
        (lambda *_: -1e300, r"it gave -1e\+300 for 'an answer', not one finite number of at most 1e\+30"),
        (lambda *_: Score(value=1.0, note=5), "it left the note 5, not a text"),  # type: ignore[arg-type]
    ],
)
def test_a_faulty_reward_is_named_with_its_question(score: Callable[..., Any], what: str) -> None:
    faulty = Reward(name="mine", summary="", version=1, score=score)
    scorer = Scorer(rewards=[faulty], weights=[1.0], owners={"mine": "plugin mine (mine 0.1)"})
    with pytest.raises(PluginFailed, match=rf"reward mine of plugin mine \(mine 0.1\) at q.jsonl:1: {what}"):
        scorer.rate([attempt()])


def opened(*scores: Any) -> Callable[..., Any]:
    return lambda settings, kept: lambda attempts: list(scores)


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ([1.0], "it gave 1 scores for 2 answers"),
        ([1.0, None], "it gave None for 'an answer'"),
        ([1.0, Score(value=math.nan)], "it gave nan for 'an answer'"),
        ("11", "it gave '11' for 2 answers, not a list of scores"),
        (b"11", "it gave b'11' for 2 answers, not a list of scores"),
        (None, "it gave None for 2 answers, not a list of scores"),
        (numpy.ones(2), r"it gave array\(\[1., 1.\]\) for 2 answers, not a list of scores"),
    ],
)
def test_a_faulty_reward_of_several_answers_is_named(scores: Any, what: str) -> None:
    faulty = Reward(name="mine", summary="", version=1, open=lambda settings, kept: lambda attempts: scores)
    scorer = Scorer(rewards=[faulty], weights=[1.0], owners={"mine": "us"})
    with pytest.raises(PluginFailed, match=what):
        scorer.rate([attempt(), attempt()])


@pytest.mark.parametrize("value", [numpy.float32(0.5), numpy.int64(3), numpy.float64(0.5), Fraction(1, 2), True])
def test_every_kind_of_real_number_is_a_score(value: Any) -> None:
    mine = Reward(name="mine", summary="", version=1, score=lambda *_: value)
    (found,) = Scorer(rewards=[mine], weights=[1.0], owners={"mine": "us"}).rate([attempt()])
    assert type(found.reward) is float
    assert found.reward == value


def test_a_full_disk_or_memory_is_no_fault_of_a_reward() -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), MemoryError()):

        def fails(*_: Any, error: Exception = error) -> float:
            raise error

        mine = Reward(name="mine", summary="", version=1, score=fails)
        with pytest.raises(type(error)):
            Scorer(rewards=[mine], weights=[1.0], owners={"mine": "us"}).rate([attempt()])


def test_a_note_is_one_line_of_a_bounded_length_wherever_it_is_counted() -> None:
    mine = Reward(name="mine", summary="", version=1, score=lambda *_: Score(value=1.0, note="é\ud800\n" + "x" * 500))
    (found,) = Scorer(rewards=[mine], weights=[1.0], owners={"mine": "us"}).rate([attempt()])
    assert "\n" not in found.notes["mine"]
    assert len(found.notes["mine"].encode()) == NOTE_BYTES


def test_a_reward_whose_other_functions_answer_nonsense_is_named() -> None:
    nonsense: dict[str, Any] = {"lacks": lambda question: 5, "prepare": lambda settings: None}
    mine = Reward(name="mine", summary="", version=1, score=lambda *_: 1.0, **nonsense)
    scorer = Scorer(rewards=[mine], weights=[1.0], owners={"mine": "us"})
    with pytest.raises(PluginFailed, match=r"reward mine of us at q.jsonl:1: lacks gave 5, neither a text nor None"):
        scorer.problems([question()])
    with pytest.raises(PluginFailed, match="reward mine of us at its settings: prepare gave None, not a text"):
        scorer.identities()


def test_an_answer_that_could_not_be_scored_has_no_reward_and_is_counted_by_its_note() -> None:
    notes = [Score(value=0.0, note="unread"), Score(value=None, note="down"), Score(value=None, note="down"), 1.0]
    judge = Reward(name="mine", summary="", version=1, open=opened(*notes))
    scorer = Scorer(rewards=[judge, SHIPPED["ended"]], weights=[2.0, 1.0], owners={"mine": "us", "ended": "us"})
    found = scorer.rate([attempt()] * 4)
    assert [each.reward for each in found] == [1.0, None, None, 3.0]
    assert [dict(each.parts) for each in found[:2]] == [{"mine": 0.0, "ended": 1.0}, {"ended": 1.0}]
    assert list(count_notes(each.notes for each in found).items()) == [("mine: down", 2), ("mine: unread", 1)]


@dataclass(kw_only=True)
class Options:
    model: str
    size: int = number(4, least=1)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"mine": {}}, "mine needs model: reward: {mine: {model: ...}}"),
        ({"mine": {"modle": "x"}}, "mine has no setting 'modle'. Did you mean model"),
        ({"mine": {"model": 3}}, "mine.model is 3, not a text"),
        ({"mine": {"model": "x", "size": 0}}, "mine.size must be at least 1, not 0"),
        ({"mine": {"model": "x", "weight": "much"}}, "the weight of mine is 'much'"),
        ({"exact": {"model": "x"}}, "exact has no setting 'model'"),
    ],
)
def test_settings_that_a_reward_does_not_have_are_rejected(given: Any, what: str) -> None:
    mine = Reward(name="mine", summary="", version=1, open=opened(), settings=Options)
    with pytest.raises(ValueError, match=re.escape(what)):
        choose(given, {**SHIPPED, "mine": mine}, {**OWNERS, "mine": "us"})


def test_a_reward_gets_its_settings_the_shared_folder_and_its_needs_into_its_identity(tmp_path: Path) -> None:
    seen: list[Any] = []

    def opens(settings: Options, kept: Path) -> Any:
        seen.append((settings, kept))
        return lambda attempts: [0.5] * len(attempts)

    mine = Reward(
        name="mine",
        summary="",
        version=2,
        open=opens,
        settings=Options,
        prepare=lambda its: f"digest of {its.model}",
    )
    scorer = choose({"mine": {"model": "x", "weight": 2}}, {"mine": mine}, {"mine": "us"}, tmp_path)
    assert scorer.identities() == {"mine": "mine 2 of us, digest of x"}
    assert [each.reward for each in scorer.rate([attempt(), attempt()]) + scorer.rate([attempt()])] == [1.0] * 3
    assert seen == [(Options(model="x"), tmp_path)]


def test_rewards_add_up_by_their_weights() -> None:
    scorer = choose({"exact": 1.0, "ended": -0.25}, SHIPPED, OWNERS)
    assert scorer.rate([attempt("x", answer="x")])[0].reward == 0.75


@pytest.mark.parametrize(
    "given",
    [{}, [], ["exact", "exact"], {"exact": "much"}, {"exact": math.nan}, 3, {"exact": True}, {"exact": -1e7}],
)
def test_settings_that_name_no_reward_are_rejected(given: Any) -> None:
    with pytest.raises(ValueError, match=r"neither|twice|weight"):
        read_choice(given)


def test_an_unknown_reward_is_named_with_its_neighbour() -> None:
    with pytest.raises(ValueError, match="Did you mean exact"):
        choose("exakt", SHIPPED, OWNERS)


def loaded(monkeypatch: pytest.MonkeyPatch, *found: Any) -> plugins.Host:
    module = ModuleType("mine_rewards")
    vars(module)["register_rewards"] = hookimpl(lambda: list(found))
    monkeypatch.setitem(__import__("sys").modules, "mine_rewards", module)
    return plugins.load([EntryPoint(name="mine", value="mine_rewards", group="posttrain")])


def test_a_plugins_reward_that_stops_an_iteration_is_named_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    host = loaded(monkeypatch, Reward(name="mine", summary="", version=1, score=lambda *_: next(iter(()))))
    with pytest.raises(PluginFailed, match=r"plugin mine .* in reward mine: StopIteration, at q.jsonl:1"):
        choose("mine", host.rewards, host.reward_owners).rate([attempt()])


def test_a_plugins_reward_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    opens = Reward(name="many", summary="", version=1, open=lambda settings, kept: lambda attempts: raises(*[None] * 3))
    host = loaded(monkeypatch, Reward(name="mine", summary="", version=1, score=raises), opens)
    with pytest.raises(PluginFailed, match=r"plugin mine .* in reward many: KeyError: 'target'.*, at q.jsonl:1"):
        choose("many", host.rewards, host.reward_owners).rate([attempt()])
    assert host.reward_owners["mine"] == "mine (mine_rewards)"
    with pytest.raises(PluginFailed, match=r"plugin mine .* in reward mine: KeyError: 'target'.*, at q.jsonl:1"):
        choose("mine", host.rewards, host.reward_owners).rate([attempt()])


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        (Reward(name="exact", summary="", version=1, score=raises), "already registered by posttrain"),
        (Reward(name="My Own", summary="", version=1, score=raises), "cannot be the name of a reward"),
        (Reward(name="mine", summary="", version=True, score=raises), "must be a whole number"),
        (Reward(name="mine", summary="", version=1), "must have either score or open"),
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
