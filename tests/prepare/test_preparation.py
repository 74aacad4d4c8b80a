"""Planted faults among clean rows: each is found and nothing else; the ledger's counts add up; witnesses stay."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from posttrain.config.preparation import Action, Compared, NearConfig, OnContamination, PrepareConfig, rule_actions
from posttrain.data.mixing import weigh
from posttrain.data.records import Conversation, Feedback, Origin, Preference, Record
from posttrain.errors import BadInput, PluginFailed
from posttrain.prepare.contamination import GateDocument
from posttrain.prepare.filters import Finding, ask
from posttrain.prepare.kept import keep
from posttrain.prepare.ledger import Ledger
from posttrain.prepare.preparation import Preparation
from posttrain.prepare.rules import QUALITY

WORDS = [
    f"{first}{second}"
    for first in ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu"]
    for second in "rtlnsdkmvz"
]


def text(rng: random.Random, words: int = 40) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def chat(prompt: str, answer: str, where: str = "a.jsonl:1", **more: Any) -> Conversation:
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Conversation(messages=turns, where=where, **more)


def prepared(
    trained: list[Any], evaluated: tuple[Record, ...] = (), documents: tuple[GateDocument, ...] = (), **settings: Any
) -> Ledger:
    config = PrepareConfig(**settings)
    judges = {
        name: (action, QUALITY[name].judge)
        for name, action in rule_actions(config, ()).items()
        if action is not Action.ignore
    }
    return Preparation(trained=trained, evaluated=evaluated, config=config, judges=judges, documents=documents).run()


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def jaccard(one: str, other: str) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


class Planted:
    """10,000 rows: copies, edited rows, documents of a gate and broken rows, in a seeded order.

    An edited row is a near copy when the exact Jaccard similarity of its groups of three words is 0.8 or more, and a
    row of its own below.
    """

    def __init__(self) -> None:
        rng = random.Random(0)
        self.documents = tuple(GateDocument("mine", at, text(rng, 30), "") for at in range(200))
        clean = [(text(rng), text(rng) + ".") for _ in range(8000)]
        rows = [("clean", *pair) for pair in clean]
        rows += [("exact", prompt.upper(), f"  {answer}") for prompt, answer in rng.sample(clean[:4000], 600)]
        for prompt, answer in rng.sample(clean[4000:], 600):
            words = prompt.split()
            for place in rng.sample(range(len(words)), rng.randint(1, 8)):
                words[place] = "changed"
            edited = " ".join(words)
            kind = "near" if jaccard(f"{prompt}\n\n{answer}", f"{edited}\n\n{answer}") >= 0.8 else "clean"
            rows.append((kind, edited, answer))
        rows += [("contamination", f"{each.prompt} {text(rng, 5)}", text(rng)) for each in self.documents]
        rows += [("empty", text(rng), " ") for _ in range(200)]
        rows += [("repetition", text(rng), text(rng, 10) + " again and again" * 30) for _ in range(200)]
        rows += [("copied_prompt", same, same) for same in (text(rng) for _ in range(200))]
        rng.shuffle(rows)
        self.kinds = [kind for kind, _, _ in rows]
        sources = [Origin(number=number, path=f"{number}.jsonl", weight=2.0) for number in (0, 1)]
        half = len(rows) // 2
        self.records = [
            chat(prompt, answer, f"{at}", origin=sources[at >= half]) for at, (_, prompt, answer) in enumerate(rows)
        ]


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


@pytest.fixture(scope="module")
def ledger(planted: Planted) -> Ledger:
    return prepared(planted.records, documents=planted.documents)


def test_planted_rows_are_dropped_and_no_others(planted: Planted, ledger: Ledger) -> None:
    assert len(planted.kinds) == 10_000
    rules = [None if found is None else found.rule for found in map(ledger.deciding, range(10_000))]
    dropped, kinds = Counter(rules), Counter(planted.kinds)
    for kind in ("contamination", "empty", "repetition", "copied_prompt"):
        found = sum(rule == kind for each, rule in zip(planted.kinds, rules, strict=True) if each == kind)
        assert found >= 0.99 * kinds[kind] == 198
        assert dropped[kind] == found
    assert 100 < kinds["near"] < 500  # and as many edited rows that are none
    copies = dropped["exact"] + dropped["near"]
    # In a shuffled order the copy may come first: then its original goes.
    assert 0.99 * (kinds["exact"] + kinds["near"]) <= copies <= kinds["exact"] + kinds["near"] + 0.001 * 10_000
    assert dropped["exact"] >= 0.99 * kinds["exact"]
    assert dropped["near"] >= 0.99 * kinds["near"]


def test_the_ledger_adds_up_and_gives_the_kept_rows(planted: Planted, ledger: Ledger, tmp_path: Path) -> None:
    ledger.write(tmp_path / "ledger.parquet", {"about": "a test"})
    table = pq.read_table(tmp_path / "ledger.parquet")
    rows = table.to_pylist()
    assert table.schema.metadata[b"about"] == b"a test"
    assert [row["id"] for row in rows] == list(range(10_000))
    kept = {row["id"] for row in rows if row["action"] == "keep"}
    dropped = Counter(row["rule"] for row in rows if row["action"] == "drop")
    summary = ledger.summary({"mine": 200})
    assert (summary.read, summary.kept, summary.dropped) == (10_000, len(kept), dict(dropped))
    assert summary.read == summary.kept + sum(summary.dropped.values())
    assert [source.read for source in summary.sources] == [5000, 5000]
    assert sum(source.kept for source in summary.sources) == summary.kept
    copies = [row for row in rows if row["rule"] in ("exact", "near")]
    assert len(copies) == summary.dropped["exact"] + summary.dropped["near"]
    assert {row["witness"] for row in copies} <= kept
    assert {(row["task"], row["document"]) for row in rows if row["rule"] == "contamination"} == {
        ("mine", at) for at in range(200)
    }
    assert sorted(kept) == ledger.kept()
    assert all(len(row["evidence"] or "") <= 200 for row in rows)
    places = [(row["source"], row["row"]) for row in rows]
    assert places == [(number, at) for number in (0, 1) for at in range(5000)]


def test_weights_survive(planted: Planted, ledger: Ledger) -> None:
    kept = [planted.records[at] for at in ledger.kept()]
    weighed = weigh(kept, seed=0)
    assert len(weighed) == 2 * len(kept)
    assert Counter(record.where for record in weighed) == {record.where: 2 for record in kept}


def test_equal_texts_under_other_system_turns_tools_or_labels_stay() -> None:
    system = [
        Conversation(
            messages=({"role": "system", "content": each}, *chat("how are you today", "very well, thank you").messages),
            where=each,
        )
        for each in ("be brief", "be kind", "be brief")
    ]
    assert prepared(system).kept() == [0, 1]
    turns = chat("name a large river", "the Nile is one").messages
    judged = [Feedback(prompt=turns[:1], completion=turns[1:], label=label, where="a") for label in (True, False, True)]
    assert prepared(judged).kept() == [0, 1]


def test_pairs_are_judged_on_prompt_and_chosen_alone() -> None:
    asked, good = ({"role": "user", "content": "name it"},), ({"role": "assistant", "content": "the Nile"},)
    empty = ({"role": "assistant", "content": ""},)
    rows = [
        Preference(prompt=asked, chosen=good, rejected=empty, where="a"),
        Preference(prompt=asked, chosen=empty, rejected=good, where="b"),
    ]
    ledger = prepared(rows)
    assert ledger.kept() == [0]
    assert ledger.found[1][0].rule == "empty"


def test_rows_of_eval_data_stay_and_leave_no_copy_to_train() -> None:
    held = chat("what is the capital of France", "it is Paris", "held.jsonl:1")
    trained = [chat("What is the capital of FRANCE", "it is Paris"), chat("who wrote Faust", "it was Goethe")]
    ledger = prepared(trained, evaluated=(held, replace(held, where="held.jsonl:2")))
    assert ledger.kept() == [1]
    assert ledger.found[0][0].witness == 2
    assert set(ledger.found) == {0}


def test_the_better_row_stays() -> None:
    answer = " ".join(f"word{at}" for at in range(60))
    worse, better = chat("tell me more", f"{answer} [Your Name]."), chat("tell me more", f"{answer} is what I know.")
    ledger = prepared([worse, better])
    assert ledger.kept() == [1]


@pytest.mark.parametrize("action", [Action.count, Action.ignore])
def test_rows_are_kept_when_the_recipe_says_so(action: Action) -> None:
    rows = [chat("a b c d", "one two three"), chat("a b c d", "one two three"), chat("e f g h", "")]
    ledger = prepared(rows, exact=action, near=NearConfig(action=action), rules={"empty": action.value})
    assert ledger.kept() == [0, 1, 2]
    assert sorted(ledger.found) == ([1, 2] if action is Action.count else [])


def test_a_rule_can_stop_the_run_naming_the_first_rows() -> None:
    rows = [chat("why", "", f"a.jsonl:{line}") for line in range(1, 13)]
    with pytest.raises(BadInput) as stopped:
        prepared(rows, rules={"empty": {"action": "stop"}})
    told = [str(problem) for problem in stopped.value.problems]
    assert "12 findings stop the run (empty)" in told[0]
    assert len(told) == 11
    assert "a.jsonl:10: empty: an answer is empty" in told[10]


def test_contamination_can_stop_the_run_or_warn() -> None:
    asked = "how many miles does the train from Leeds cover in three hours"
    document = GateDocument("miles", 7, asked, "")
    config = PrepareConfig()
    rows = [chat(asked, "210"), chat("which river flows through the town of Ingbury", "the Yare")]
    for action, kept in ((OnContamination.warn, [0, 1]), (OnContamination.ignore, [0, 1]), (OnContamination.drop, [1])):
        config.contamination.action = action
        ledger = prepared(rows, documents=(document,), contamination=config.contamination)
        assert ledger.kept() == kept
        assert not ledger.summary({"miles": 3}).is_of_gates()
    config.contamination.action = OnContamination.stop
    with pytest.raises(BadInput, match="contamination"):
        prepared(rows, documents=(document,), contamination=config.contamination)


def test_data_of_gates_alone_is_trained_and_named() -> None:
    asked = [f"how many miles does train {number} from Leeds cover in three hours" for number in range(3)]
    documents = tuple(GateDocument("miles", number, text, "") for number, text in enumerate(asked))
    rows = [*(chat(text, "210") for text in asked), chat(asked[0], "210"), chat("Why?", "")]
    ledger = prepared(rows, documents=documents)
    assert ledger.kept() == [0, 1, 2]  # without the copy and the empty answer
    assert ledger.summary({"miles": 3}).is_of_gates()
    assert ledger.summary({"miles": 3}).found["contamination"] == 4


class Strange:
    """A filter of a plugin that answers whatever a test wants."""

    name, version = "strange", "1"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def judge(self, rows: Any) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([None], r"plugin theirs, filter strange: judge answered 1 findings for 2 rows, not one per row"),
        (None, r"plugin theirs, filter strange: judge answered null, not a list with one entry per row"),
        ([None, "bad"], r"plugin theirs, filter strange: judge answered 'bad' among others, not Finding or None"),
    ],
)
def test_a_filter_with_another_answer_is_named(answer: Any, message: str) -> None:
    with pytest.raises(PluginFailed, match=message):
        ask(Strange(answer), "theirs", [chat("a", "b"), chat("c", "d")])  # type: ignore[list-item]


def test_a_filters_answer_is_handed_on() -> None:
    found = [None, Finding(evidence="here", score=1.0)]
    assert ask(Strange(found), "theirs", [chat("a", "b"), chat("c", "d")]) == found  # type: ignore[list-item]


def labelled(answer: str, question: str, *, good: bool = True, number: int = 0) -> Feedback:
    turns = ({"role": "user", "content": question},), ({"role": "assistant", "content": answer},)
    origin = Origin(number=number, path=f"{number}.jsonl")
    return Feedback(prompt=turns[0], completion=turns[1], label=good, where=question, origin=origin)


def test_answers_of_a_model_to_one_question_are_no_copies_of_each_other() -> None:
    rng = random.Random(4)
    one, two = text(rng, 60), text(rng, 60)
    answers = [labelled(f"the {end}", one) for end in ("first", "second", "third")]
    copied = [labelled("the first", one + " x", number=1), labelled("the fourth", two, number=1)]
    assert prepared([*answers, *copied]).kept() == [0, 4], "of a file all but one are near copies"
    config = PrepareConfig()
    made = Preparation(trained=[*answers, *copied], config=config, judges={}, sampled=5).run()
    assert made.kept() == [0, 1, 2, 4], "the copy of the question leaves"
    assert made.found[3][0].witness in (0, 1, 2)
    over = PrepareConfig(near=NearConfig(over=Compared.prompt))
    same = Preparation(
        trained=[*answers, labelled("the first", one.upper(), number=1)], config=over, judges={}, sampled=4
    )
    assert same.run().kept() == [0, 1, 2]


def test_an_answer_that_was_judged_bad_may_have_every_fault() -> None:
    rows = [labelled("", "What is it?", good=good) for good in (True, False)]
    assert prepared(rows).kept() == [1]


def changed(words: str, count: int) -> str:
    """Return a text in which ``count`` words of the middle are others."""
    parts = words.split()
    parts[20 : 20 + count] = [f"other{number}" for number in range(count)]
    return " ".join(parts)


def test_rows_alike_are_of_one_cluster_even_below_the_threshold(tmp_path: Path) -> None:
    rng = random.Random(5)
    one, other = text(rng, 80), text(rng, 80)
    texts = [one, text(rng), changed(one, 1), changed(one, 12), other, other.upper(), text(rng)]
    rows = [chat(prompt, "yes", f"a:{at}") for at, prompt in enumerate(texts)]
    counted = prepared(rows, near=NearConfig(action=Action.count), exact=Action.count)
    assert counted.kept() == list(range(7))
    assert 0.5 < jaccard(one, texts[3]) < 0.8
    assert counted.clusters == {0: 0, 2: 0, 3: 0, 4: 4, 5: 4}
    assert prepared(rows).clusters == counted.clusters, "a row that leaves connects those that stay"
    done = keep(tmp_path, "key", prepared(rows), {})
    assert ([*done.rows()], done.clusters()["a:3"]) == ([0, 1, 3, 4, 6], 0)
