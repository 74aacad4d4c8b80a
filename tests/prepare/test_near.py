"""Duplicates beside a brute-force oracle of Python sets."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.prepare import signatures
from posttrain.prepare.near import Duplicate, find_duplicates

VOCABULARY = [f"{first}{second}{third}" for first in "bdfgk" for second in "aeiou" for third in ("n", "rm", "st", "ll")]


def shingle_set(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9_]+", text.lower())
    return frozenset(tuple(words[at : at + 3]) for at in range(max(len(words) - 2, min(len(words), 1))))


def jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def sentence(rng: random.Random, length: int) -> list[str]:
    return [rng.choice(VOCABULARY) + rng.choice(["", "ed", "ing", "s"]) for _ in range(length)]


def edited(words: list[str], edits: int, rng: random.Random) -> list[str]:
    found = list(words)
    for _ in range(edits):
        at, kind = rng.randrange(len(found)), rng.random()
        found[at : at + 1] = [] if kind < 0.2 else [found[at], "new"] if kind < 0.4 else sentence(rng, 1)
    return found


def planted(count: int, seed: int) -> list[str]:
    """Rows of which a tenth are exact copies in other clothes, and a fifth edited ones."""
    rng = random.Random(seed)
    rows: list[list[str]] = []
    texts: list[str] = []
    for _ in range(count):
        kind = rng.random() if rows else 1.0
        words = rng.choice(rows) if kind < 0.3 else sentence(rng, rng.randint(1, 120))
        if 0.1 <= kind < 0.3:
            words = edited(words, rng.randint(1, 1 + len(words) // 10), rng) or words
        text = rng.choice([" ", "  ", " \n "]).join(words)
        rows.append(words)
        texts.append(text.upper() if rng.random() < 0.2 else text)
    return texts


def in_chunks(texts: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (texts[at : at + size] for at in range(0, len(texts), size))


def found_in(texts: Sequence[str], size: int = 500, **settings: object) -> tuple[Duplicate, ...]:
    return find_duplicates(lambda: in_chunks(texts, size), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_what_goes_is_what_brute_force_takes(threshold: float) -> None:
    texts = planted(1200, 1)
    found = found_in(texts, threshold=threshold)
    gone = {each.row for each in found}
    sets = [shingle_set(text) for text in texts]
    stays = [row for row in range(len(texts)) if row not in gone]
    holders: dict[tuple[str, ...], list[int]] = {}
    for row in stays:
        for shingle in sets[row]:
            holders.setdefault(shingle, []).append(row)
    missed = [
        (row, other)
        for row in stays
        for other in {other for shingle in sets[row] for other in holders[shingle] if other < row}
        if jaccard(sets[row], sets[other]) >= threshold
    ]
    assert len(gone) > 100
    assert len(missed) <= len(gone) / 100
    for each in found:
        assert each.witness not in gone
        same = " ".join(texts[each.row].lower().split()) == " ".join(texts[each.witness].lower().split())
        assert same == (each.kind == "exact")
        assert each.similarity == pytest.approx(1.0 if same else jaccard(sets[each.row], sets[each.witness]))
        assert each.similarity >= threshold


@given(
    st.lists(st.lists(st.sampled_from(["on", "off", "up", "and"]), max_size=9), max_size=30),
    st.randoms(use_true_random=False),
)
def test_every_row_of_small_words_goes_for_one_that_stays(rows: list[list[str]], rng: random.Random) -> None:
    texts = [" ".join(row) for row in rows]
    quality = [rng.choice([0.0, 1.0, 2.0]) for _ in rows]
    found = found_in(texts, size=7, threshold=0.5, quality=quality)
    gone = {each.row for each in found}
    assert len(gone) == len(found)
    for each in found:
        assert each.witness not in gone
        assert (-quality[each.witness], each.witness) < (-quality[each.row], each.row)
        if each.kind == "near":
            assert jaccard(shingle_set(texts[each.row]), shingle_set(texts[each.witness])) >= 0.5
    kept = [text for row, text in enumerate(texts) if row not in gone]
    assert len(set(kept)) == len(kept)


def test_the_better_row_stays_and_else_the_first() -> None:
    text = " ".join(sentence(random.Random(0), 60))
    rows = [text, text.upper(), text + " so", "something else", text]
    assert [(each.row, each.witness, each.kind) for each in found_in(rows)] == [
        (1, 0, "exact"), (2, 0, "near"), (4, 0, "exact"),
    ]  # fmt: skip
    best = found_in(rows, quality=[0, 0, 5, 0, 0])
    assert [(each.row, each.witness, each.kind) for each in best] == [(0, 2, "near"), (1, 2, "near"), (4, 2, "near")]


def test_a_row_like_one_that_goes_stays() -> None:
    rng = random.Random(3)
    words = sentence(rng, 100)
    middle = [*words[:92], *sentence(rng, 8)]
    end = [*sentence(rng, 8), *middle[8:]]
    rows = [" ".join(each) for each in (words, middle, end)]
    assert (
        jaccard(shingle_set(rows[1]), shingle_set(rows[2])) >= 0.8 > jaccard(shingle_set(rows[0]), shingle_set(rows[2]))
    )
    assert [(each.row, each.witness) for each in found_in(rows)] == [(1, 0)]


def test_rows_of_one_template_stay_and_their_copies_go() -> None:
    """Thousands of rows share half of their words: groups are large, and a near copy is found all the same."""
    rng = random.Random(4)
    head = sentence(rng, 40)
    rows = [[*head, *sentence(rng, 16)] for _ in range(1500)]
    copies = [[*row[:-1], "end"] for row in rows[::30]]
    found = found_in([" ".join(row) for row in [*rows, *copies]])
    assert {each.row: each.witness for each in found} == {1500 + number: 30 * number for number in range(50)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 12 + 30?", "What is 12 - 30?"),
        ("Is 3 < 5 here", "is 3 > 5 here?"),
        ("Add -5 and 7 to it", "add 5 and 7 to it"),
        ("3 * 4 is", "3 / 4 is"),
        ("3 × 4 is", "3 ÷ 4 is"),
    ],
)
def test_problems_with_other_operators_are_no_duplicates(one: str, other: str) -> None:
    assert found_in([one, other]) == ()
    assert [each.kind for each in found_in([one, one + "!"])] == ["near"]


def test_languages_without_spaces_are_compared_by_characters() -> None:
    one = "今天天气很好，我们一起去公园散步，然后在湖边吃午饭，下午再去图书馆看书，晚上回家做饭。"
    thai = "วันนี้อากาศดีมากเราไปเดินเล่นที่สวนสาธารณะด้วยกันแล้วกินข้าวกลางวันริมทะเลสาบ"
    rows = [
        one,
        one.replace("晚上", "晚间"),
        "我喜欢在周末的时候和朋友们一起打篮球或者看电影，有时候也会去爬山。",
        thai,
        thai + "ครับ",
    ]
    assert [(each.row, each.witness, each.kind) for each in found_in(rows, threshold=0.7)] == [
        (1, 0, "near"), (4, 3, "near"),
    ]  # fmt: skip


def test_strange_rows_are_taken_as_they_are() -> None:
    word = "x" * 700_000
    rows = [
        "",
        " \n",
        "...",
        "?!",
        "\ud800 half",
        "nul\0 byte",
        word,
        word + "y",
        "a b " * 300_000,
        "A  b " * 300_000,
        "",
    ]
    assert [(each.row, each.witness, each.kind) for each in found_in(rows, size=2)] == [
        (1, 0, "exact"), (9, 8, "exact"), (10, 0, "exact"),
    ]  # fmt: skip
    assert found_in([]) == ()


def test_the_histogram_counts_what_was_compared() -> None:
    text = " ".join(sentence(random.Random(5), 60))
    found = find_duplicates(lambda: [[text, text + " so", text + "!"]])
    assert found.similarities.sum() == 2
    assert found.similarities[-2:].sum() == 2


@pytest.mark.parametrize("size", [1, 37, 5000])
def test_the_size_of_chunks_changes_nothing(size: int) -> None:
    texts = planted(400, 2)
    assert found_in(texts, size) == found_in(texts, 64)


def test_the_seed_of_python_hashes_changes_nothing() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_near as t; print(t.found_in(t.planted(300, 6)))"
    printed = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.strip() == str(found_in(planted(300, 6)))


class Killed(Exception):
    """A kill in the middle of a run."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "CHUNK", 100)


def count_signed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every chunk whose keys are computed."""
    signed: list[int] = []
    compute = signatures._keys

    def counting(*arguments: object) -> object:
        signed.append(1)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(signatures, "_keys", counting)
    return signed


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_run_goes_on_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = planted(500, 7)
    expected = found_in(texts)
    for stop in range(0, 500, 100):

        def dying(stop: int = stop) -> Iterable[Sequence[str]]:
            yield from in_chunks(texts[:stop], 50)
            raise Killed

        with pytest.raises(Killed):
            find_duplicates(dying, folder=tmp_path)
    signed = count_signed(monkeypatch)
    assert found_in(texts, folder=tmp_path) == expected
    assert len(signed) == 1
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found_in(texts, folder=tmp_path / "fresh")
    assert {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()} == whole
    assert len(whole) == 5


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "foreign"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = planted(300, 8)
    expected = found_in(texts, folder=tmp_path)
    path = sorted(tmp_path.iterdir())[1]
    sound = path.read_bytes()
    damaged = {
        "bit": sound[:1000] + bytes([sound[1000] ^ 1]) + sound[1001:],
        "cut": sound[:-100],
        "empty": b"",
        "foreign": sorted(tmp_path.iterdir())[0].read_bytes(),
    }
    path.write_bytes(damaged[damage])
    signed = count_signed(monkeypatch)
    assert found_in(texts, folder=tmp_path) == expected
    assert (len(signed), path.read_bytes()) == (1, sound)
