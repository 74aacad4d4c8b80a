"""Scores on disk: the scorecard, and the cache keyed by content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.errors import ArtifactDamaged
from posttrain.gate.spec import DocumentScore
from posttrain.scoring.cache import ScoreCache, score_key
from posttrain.scoring.questions import PreparedTask, Question
from posttrain.scoring.scorecard import PROMPT_END, read_questions, read_scorecard, write_questions, write_scorecard

KEY = score_key(system="abc", questions=[[0, "d", "r", "t"]])
ASKED = {0: ("d0", "r0", "t0"), 1: ("d1", "r1", "t1")}


def row(doc_id: int, filter_name: str = "none") -> DocumentScore:
    return DocumentScore(
        system="candidate",
        digest="abc",
        task="quiz",
        filter=filter_name,
        doc_id=doc_id,
        document_hash=f"d{doc_id}",
        request_hash=f"r{doc_id}",
        target_hash=f"t{doc_id}",
        metrics={"acc": 0.1 + doc_id},
        response="line one\nline\u2028two \N{SNOWMAN}",
        target="x",
    )


ROWS = [row(0), row(1)]


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path / "not" / "there" / "yet")


def entry(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there" / "yet" / f"{KEY}.jsonl"


def test_rows_come_back_without_the_names_of_a_run(cache: ScoreCache) -> None:
    assert cache.read(KEY, ASKED, ["none"]) is None
    cache.write(KEY, ROWS)
    assert cache.read(KEY, ASKED, ["none"]) == [replace(item, system="", task="") for item in ROWS]


def test_of_a_long_prompt_the_end_is_kept(tmp_path: Path) -> None:
    prompts = ["short \u2028 \N{SNOWMAN}", "example " * 1000 + "the question"]
    questions = [
        Question(
            doc_id=doc_id, doc={}, leaf=None, requests=[SimpleNamespace(args=(prompt, {}))], document_hash="",
            request_hash="", target_hash="", target="",
        )
        for doc_id, prompt in enumerate(prompts)
    ]  # fmt: skip
    task = PreparedTask(
        name="quiz",
        metric="acc",
        higher_is_better=True,
        leaves=[],
        filters=[],
        questions=questions,
        settings=None,
        ends=[],
    )
    write_questions(tmp_path / "questions.jsonl", [task])
    found = read_questions(tmp_path / "questions.jsonl")
    assert {key: each.prompt for key, each in found.items()} == {
        ("quiz", 0): prompts[0], ("quiz", 1): prompts[1][-PROMPT_END:],
    }  # fmt: skip
    assert found["quiz", 1].prompt.endswith("the question")
    assert found["quiz", 1].name == "document 1"


def test_another_key_finds_nothing(cache: ScoreCache) -> None:
    cache.write(KEY, ROWS)
    assert cache.read(score_key(system="other"), ASKED, ["none"]) is None


def test_every_part_of_the_content_changes_the_key() -> None:
    content = {"system": "a", "questions": [[0, "d", "r", "t"]], "dtype": "float32", "batch_size": 16}
    others = [{**content, "system": "b"}, {**content, "dtype": "bfloat16"}, {**content, "batch_size": 8}]
    others.append({**content, "questions": [[0, "d", "r2", "t"]]})
    assert len({score_key(**other) for other in (content, *others)}) == 5
    assert score_key(**dict(reversed(content.items()))) == score_key(**content)


@pytest.mark.parametrize("damage", ["", "{}\n", "[]\n", "no json\n", '{"key": "other", "sha256": ""}\n', "\udcff"])
def test_a_damaged_head_is_not_trusted(cache: ScoreCache, tmp_path: Path, damage: str) -> None:
    cache.write(KEY, ROWS)
    entry(tmp_path).write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r".+"):
        cache.read(KEY, ASKED, ["none"])


def test_a_changed_score_is_not_trusted(cache: ScoreCache, tmp_path: Path) -> None:
    cache.write(KEY, ROWS)
    text = entry(tmp_path).read_text(encoding="utf-8")
    entry(tmp_path).write_text(text.replace('"acc":0.1', '"acc":1.0'), encoding="utf-8")
    with pytest.raises(ValueError, match="hash"):
        cache.read(KEY, ASKED, ["none"])


def test_a_truncated_entry_is_not_trusted(cache: ScoreCache, tmp_path: Path) -> None:
    cache.write(KEY, ROWS)
    text = entry(tmp_path).read_text(encoding="utf-8")
    for cut in range(0, len(text) - 1, 97):
        entry(tmp_path).write_text(text[:cut], encoding="utf-8")
        with pytest.raises(ValueError, match=r".+"):
            cache.read(KEY, ASKED, ["none"])


@pytest.mark.parametrize(
    ("asked", "filters"),
    [({0: ASKED[0]}, ["none"]), ({**ASKED, 1: ("d1", "x", "t1")}, ["none"]), (ASKED, ["none", "strict"])],
)
def test_answers_to_other_questions_are_not_used(
    cache: ScoreCache, asked: dict[int, tuple[str, str, str]], filters: list[str]
) -> None:
    cache.write(KEY, ROWS)
    with pytest.raises(ValueError, match="other documents"):
        cache.read(KEY, asked, filters)


def test_a_scorecard_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [*ROWS, row(0, "strict")]
    write_scorecard(tmp_path / "scorecard.jsonl", rows)
    assert read_scorecard(tmp_path / "scorecard.jsonl") == rows


@pytest.mark.parametrize("line", ["{", "{}", "[1]", "0"])
def test_a_damaged_scorecard_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "scorecard.jsonl"
    write_scorecard(path, ROWS)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(ArtifactDamaged, match=r"scorecard\.jsonl:3 is (not a score|damaged)"):
        read_scorecard(path)


def test_a_score_of_the_wrong_type_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "scorecard.jsonl"
    write_scorecard(path, ROWS[:1])
    path.write_text(path.read_text(encoding="utf-8").replace('"doc_id":0', '"doc_id":"0"'), encoding="utf-8")
    with pytest.raises(ArtifactDamaged, match="doc_id"):
        read_scorecard(path)
