"""Replay: general records beside a stage's own, a share of its tokens, prepared and shown as all others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.config.replay import AutoShare
from tests.support.tiny import write_base

RECIPE = """\
defaults: [/stage@sft: sft, /gate@sft.gate: none, /stage@dpo: dpo, /gate@dpo.gate: none, _self_]
model: {path: base, dtype: float32}
sft:
  data: [{path: books, format: text}]
  lr: 1e-2
  sequence_length: 256
  gradient_accumulation: 2
  epochs: 1
dpo: {data: pairs.jsonl}
"""
REPLAY = "sft.replay={path: chats.jsonl, share: 0.3}"


@pytest.fixture
def project(working_folder: Path) -> Path:
    (working_folder / "recipes").mkdir()
    (working_folder / "recipes" / "mine.yaml").write_text(RECIPE)
    (working_folder / "books").mkdir()
    for number, word in enumerate(("red", "blue", "green", "grey")):
        (working_folder / "books" / f"{number}.txt").write_text(f"Chapter {number}: " + f"a {word} {number} " * 12)
    chats = [{"prompt": f"what is {word}", "completion": f"{word} is {word[::-1]}"} for word in ("elm", "ash", "oak")]
    (working_folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in [*chats, chats[0]]))
    (working_folder / "pairs.jsonl").write_text(json.dumps({"prompt": "hi", "chosen": "yes", "rejected": "no"}) + "\n")
    return working_folder


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    return int(caught.value.code or 0)


def test_replayed_records_are_prepared_drawn_and_counted_as_those_of_a_source(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(project / "base")
    words = ["recipe=mine", "stages=[sft]", REPLAY, "sft.prepare.rules.repetition=ignore"]
    assert run("plan", *words) == 0
    assert "replay chats.jsonl  (30.0% of the tokens)" in capsys.readouterr().out
    assert run(*words) == 0
    (manifest,) = project.glob("runs/*/stages/sft/artifact/manifest.json")
    values = json.loads(manifest.read_text())
    books, chats = values["metrics"]["sources"]
    assert (books["records"], chats["records"]) == (4, 3)  # the fourth chat is a copy
    assert chats["tokens"] / (books["tokens"] + chats["tokens"]) == pytest.approx(0.3, abs=0.02)
    assert values["config"]["replay"] == {"path": "chats.jsonl", "share": 0.3}
    capsys.readouterr()
    assert run("data", "--json", *words) == 0
    (prepared,) = json.loads(capsys.readouterr().out)["stages"].values()
    assert [(each["source"], each["read"], each["kept"]) for each in prepared["sources"]] == [
        ("books", 4, 4),
        ("chats.jsonl", 4, 3),
    ]
    assert run("tokens", *words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sft: chats.jsonl" in shown


def test_replay_is_the_same_stage_as_a_source_with_that_share(project: Path) -> None:
    write_base(project / "base")
    words = ["recipe=mine", "stages=[sft]", "sft.prepare.enabled=false"]
    assert run(*words, REPLAY) == 0
    assert run(*words, "sft.data=[{path: books, format: text},{path: chats.jsonl, share: 0.3}]") == 0
    assert len(list(project.glob("runs/mine-*"))) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sft.replay=chats.jsonl", "sft.replay: has neither share nor auto: give share=0.1, or auto to search for it"),
        ("sft.replay={path: chats.jsonl, share: 0.1, auto: {}}", "sft.replay: has both share and auto"),
        ("sft.replay={path: chats.jsonl, share: 1}", "sft.replay: share 1.0 of chats.jsonl is not between 0 and 1"),
        ("sft.replay={path: nowhere.jsonl, share: 0.1}", "sft.replay: nowhere.jsonl: no such file or directory"),
        ("sft.replay={path: chats.jsonl, share: 0.1, weight: 2}", "sft.replay: chats.jsonl has a share and a weight"),
        ("sft.replay={share: 0.1}", "sft.replay.path: has no value"),
        ("sft.replay={path: chats.jsonl, auto: {least: 0.5, most: 0.2}}", "sft.replay.auto.most: is 0.2, less than"),
        ("sft.replay={path: chats.jsonl, auto: {attempts: 0}}", "sft.replay.auto.attempts: must be between 1 and 20"),
        ("sft.replay={path: chats.jsonl, auto: {}}", "sft.replay.auto: auto searches for the share"),
        ("dpo.replay={path: chats.jsonl, share: 0.1}", "dpo.replay: dpo trains preferences: its loss compares two"),
        ("sft.replay={path: chats.jsonl, auto: {least: 0.5, most: 1.2}}", "sft.replay.auto.most: must be above 0"),
    ],
)
def test_what_cannot_be_replayed_is_rejected_with_the_reason(
    project: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert run("plan", "recipe=mine", override) == 2
    assert message in capsys.readouterr().err


def test_the_shares_of_the_attempts_grow_by_equal_factors_within_the_bounds() -> None:
    assert AutoShare(least=0.05, most=0.4, attempts=4).shares() == [0.05, 0.1, 0.2, 0.4]
    assert AutoShare(least=0.1, most=0.3, attempts=1).shares() == [0.1]
    assert AutoShare(least=0.1, most=0.1, attempts=2).shares() == [0.1, 0.1]
