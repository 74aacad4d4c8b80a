"""Mixing: weights decide how often a record is seen, shares how many tokens a source brings, and the seed which."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain import cli
from posttrain.config.schema import Source
from posttrain.data.mixing import read_sources
from posttrain.data.records import Conversation, Origin
from posttrain.errors import BadInput
from posttrain.tokens.shares import Sizes, draw_by_share, measure_shares
from tests.support.tiny import write_base


def source(tmp_path: Path, name: str, count: int, **options: Any) -> Source:
    path = tmp_path / f"{name}.jsonl"
    lines = [json.dumps({"prompt": f"{name}{n}", "completion": "ok"}) + "\n" for n in range(count)]
    path.write_text("".join(lines))
    return Source(path=str(path), **options)


def prompts(sources: list[Source], seed: int = 0) -> list[str]:
    records = read_sources(sources, "conversations", seed)
    return [record.messages[0]["content"] for record in records if isinstance(record, Conversation)]


def test_sources_follow_one_another_in_order(tmp_path: Path) -> None:
    mixed = prompts([source(tmp_path, "b", 2), source(tmp_path, "a", 2)])
    assert mixed == ["b0", "b1", "a0", "a1"]


@pytest.mark.parametrize(("weight", "once", "twice"), [(1, 10, 0), (2, 0, 10), (0.5, 5, 0), (1.5, 5, 5), (0.01, 1, 0)])
def test_weight_is_how_often_a_record_is_seen(tmp_path: Path, weight: float, once: int, twice: int) -> None:
    seen = Counter(Counter(prompts([source(tmp_path, "a", 10, weight=weight)])).values())
    assert (seen[1], seen[2], sum(seen.values())) == (once, twice, once + twice)


def test_the_seed_decides_which_half(tmp_path: Path) -> None:
    half = [source(tmp_path, "a", 40, weight=0.5)]
    assert prompts(half, seed=1) == prompts(half, seed=1)
    assert prompts(half, seed=1) != prompts(half, seed=2)


def test_equal_sources_draw_different_halves(tmp_path: Path) -> None:
    half = source(tmp_path, "a", 40, weight=0.5)
    mixed = prompts([half, half])
    assert mixed[:20] != mixed[20:]


def test_empty_data_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="names no source"):
        prompts([])
    with pytest.raises(BadInput, match="holds no records"):
        prompts([source(tmp_path, "full", 2), source(tmp_path, "empty", 0)])


# --- Shares of the tokens ---------------------------------------------------------------------------------------------

NARROW, GENERAL = Origin(number=0, path="narrow"), Origin(number=1, path="general", share=0.2)


def texts(origin: Origin, lengths: list[int]) -> list[tuple[Origin, int]]:
    """Documents by their source and their tokens, of which all but one are trained."""
    return [(origin, size) for size in lengths]


def sizes_of(pairs: list[tuple[Origin, int]]) -> Sizes:
    origins = list(dict.fromkeys(origin for origin, _ in pairs))
    tokens = np.array([size for _, size in pairs])
    numbers = np.array([origins.index(origin) for origin, _ in pairs])
    return Sizes(origins=origins, numbers=numbers, tokens=tokens, trained=np.maximum(tokens - 1, 0))


def drawn(pairs: list[tuple[Origin, int]], seed: int = 0) -> list[int]:
    found: list[int] = draw_by_share(sizes_of(pairs), seed).tolist()
    return found


@given(
    narrow=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    general=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    other=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    shares=st.tuples(st.floats(0.01, 0.49), st.floats(0.01, 0.49)),
    seed=st.integers(0, 3),
)
def test_every_source_has_its_share_as_near_as_whole_records_come(
    narrow: list[int], general: list[int], other: list[int], shares: tuple[float, float], seed: int
) -> None:
    origins = [NARROW, *(Origin(number=n, path=str(n), share=share) for n, share in enumerate(shares, start=1))]
    pairs = [
        pair for origin, group in zip(origins, (narrow, general, other), strict=True) for pair in texts(origin, group)
    ]
    taken = drawn(pairs, seed)
    assert taken == sorted(taken) == drawn(pairs, seed)
    assert taken[: len(narrow)] == list(range(len(narrow)))
    total = sum(narrow) / (1 - sum(shares))
    for origin, group in zip(origins[1:], (general, other), strict=True):
        found = [index for index in taken if pairs[index][0] is origin]
        tokens = sum(pairs[index][1] for index in found)
        assert abs(tokens - origin.share * total) <= max(group) / 2 + 1e-6 or len(found) == 1
        times = Counter(found)
        assert max(times.values()) - min(times.get(i, 0) for i, (other, _) in enumerate(pairs) if other is origin) <= 1


def test_a_source_that_is_too_small_is_repeated_and_the_note_says_how_often() -> None:
    pairs = texts(NARROW, [10] * 80) + texts(GENERAL, [10] * 8)
    taken = drawn(pairs)
    narrow, general = measure_shares(sizes_of(pairs), np.array(taken))
    assert (general.records, general.taken, general.tokens, general.trained, general.share) == (8, 20, 200, 180, 0.2)
    assert general.note() == "general: 20.0% of the tokens, 20 records drawn from 8, each 2.5 times"
    assert narrow.note() == "narrow: 80.0% of the tokens, 80 records drawn from 80"


def test_the_seed_decides_which_records_are_replayed() -> None:
    pairs = texts(NARROW, [10] * 40) + texts(GENERAL, [10] * 100)
    assert drawn(pairs, seed=1) == drawn(pairs, seed=1) != drawn(pairs, seed=2)


def test_records_in_which_nothing_is_trained_are_not_drawn() -> None:
    pairs = texts(NARROW, [40]) + texts(GENERAL, [0, 10, 0])
    assert drawn(pairs) == [0, 2]


@pytest.mark.parametrize(
    ("narrow", "general", "message"),
    [
        ([10], [0, 0], "general: has a share of the tokens, but no record"),
        ([0], [10], "data: the sources without a share"),
    ],
)
def test_a_source_without_a_trained_token_has_no_share(narrow: list[int], general: list[int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        drawn(texts(NARROW, narrow) + texts(GENERAL, general))


RECIPE = """\
defaults: [/stage@sft: sft, /gate@sft.gate: none, /stage@dpo: dpo, /gate@dpo.gate: none, _self_]
model: {path: base, dtype: float32}
sft:
  data: [{path: books, format: text}, {path: chats.jsonl, share: 0.3}]
  lr: 1e-2
  sequence_length: 48
  prepare: {enabled: false}
  overlong: split
  gradient_accumulation: 2
  epochs: 1
dpo: {data: pairs.jsonl}
"""


@pytest.fixture
def project(working_folder: Path) -> Path:
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    (working_folder / "books").mkdir()
    for number in range(4):
        (working_folder / "books" / f"{number}.txt").write_text(f"Chapter {number}. " + "It went on and on. " * 5)
    chat = {"prompt": "hi", "completion": "hello"}
    (working_folder / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 5)
    (working_folder / "pairs.jsonl").write_text(json.dumps({"prompt": "hi", "chosen": "yes", "rejected": "no"}) + "\n")
    return working_folder


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    return int(caught.value.code or 0)


def test_raw_text_with_a_share_of_chats_is_trained(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(project / "base")
    assert run("recipe=mine", "stages=[sft]") == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "books: 69.6% of the tokens, 4 records drawn from 4" in shown
    assert "chats.jsonl: 30.4% of the tokens, 17 records drawn from 5, each 3.4 times" in shown
    assert "4 of 21 records are longer than 48 tokens and split" in shown
    (manifest,) = project.glob("runs/*/stages/sft/artifact/manifest.json")
    metrics = json.loads(manifest.read_text())["metrics"]
    books, chats = metrics["sources"]
    length = len("Chapter 0. " + "It went on and on. " * 5) + 1
    assert books == {"records": 4, "taken": 4, "tokens": 4 * length, "trained_tokens": 4 * (length - 3)}
    assert chats == {"records": 5, "taken": 17, "tokens": 17 * 11, "trained_tokens": 17 * 6}
    assert metrics["epoch_tokens"] == books["tokens"] + chats["tokens"]
    assert (metrics["split"], metrics["pieces"], metrics["unpredicted_tokens"]) == (4, 12 + 17, 8)


def test_the_shipped_recipe_replays_and_says_what_it_scores_and_trains(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(project / "base")
    rows = [{"text": f"The town {number} has a river."} for number in range(8)]
    answers = [{"instruction": f"Say {number}", "input": "", "output": "As you wish."} for number in range(8)]
    for name, found in (("t", rows[:6]), ("heldout", rows[4:]), ("a", answers[:4]), ("others", answers[4:])):
        (project / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    words = ["sft.data.0.path=t.jsonl", "sft.data.1.path=a.jsonl", "gate_data.texts=heldout.jsonl"]
    words += ["gate_data.responses=others.jsonl", "model.path=base", "model.dtype=float32", "sft.lr=1e-3"]
    assert run("recipe=smollm2_cpt_replay", *words, "sft.gate.on_undecided=warn", "sft.gate.on_fail=warn") == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "warning: 2 of 4 documents of the task texts are in the data" in shown
    assert "of the task responses" not in shown
    assert "1 records drawn from 4" in shown


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.data=[{path: books, weight: 0}]", "sft.data: weight of books is 0.0, must be above 0 and finite"),
        ("sft.data=[{path: books, weight: -1}]", "sft.data: weight of books is -1.0, must be above 0 and finite"),
        ("sft.data=[{path: books, weight: nan}]", "sft.data: weight of books is nan, must be above 0 and finite"),
        ("sft.data=[{path: books, weight: inf}]", "sft.data: weight of books is inf, must be above 0 and finite"),
        ("sft.data=[chats.jsonl,{path: books, limit: 0}]", "sft.data: limit of books is 0, must be at least 1"),
        ("sft.eval_data={path: books, limit: -1}", "sft.eval_data: limit of books is -1, must be at least 1"),
        ("sft.data=[books,{path: chats.jsonl, share: 1.5}]", "share 1.5 of chats.jsonl is not between 0 and 1"),
        ("sft.data=[books,{path: chats.jsonl, share: 0}]", "share 0.0 of chats.jsonl is not between 0 and 1"),
        ("sft.data=[books,{path: chats.jsonl, share: nan}]", "share nan of chats.jsonl is not between 0 and 1"),
        ("sft.data=[{path: books, share: 0.7}]", "every source has a share"),
        ("sft.data=[books,{path: chats.jsonl, share: 0.3, weight: 2}]", "has a share and a weight"),
        (
            "sft.data=[books,{path: chats.jsonl, share: 0.3},{path: pairs.jsonl, share: 0.8}]",
            "the shares sum to 1.1, which leaves nothing",
        ),
        (
            "dpo.data=[pairs.jsonl,{path: pairs.jsonl,share: 0.5}]",
            "share is of the tokens of documents, but dpo",
        ),
    ],
)
def test_sources_with_wrong_options_are_rejected(
    project: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert run("plan", "recipe=mine", override) == 2
    assert message in capsys.readouterr().err


def test_the_plan_shows_the_share(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "recipe=mine") == 0
    assert "data   chats.jsonl  (30.0% of the tokens)" in capsys.readouterr().out
