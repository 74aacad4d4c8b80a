"""Rows that say the same in other words, by a tiny static model whose vectors are known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model2vec import StaticModel
from tokenizers import Tokenizer, models, pre_tokenizers

from posttrain.config.preparation import Action, PrepareConfig, SemanticConfig, setting_problem
from posttrain.data.records import Conversation
from posttrain.prepare import semantic
from posttrain.prepare.preparation import Preparation
from posttrain.prepare.semantic import find_alike, load

WORDS = ["?", "big", "large", "dog", "hound", "red", "green"]
VECTORS = np.array([[0, 0, 0], [1, 0, 0], [1, 0.01, 0], [0, 1, 0], [0.01, 1, 0], [0, 0, 1], [0.5, 0, 1]], np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    StaticModel(VECTORS, tokenizer).save_pretrained(tmp_path / "static")
    return tmp_path / "static"


def oracle(texts: list[str], threshold: float) -> list[tuple[int, int]]:
    """The pairs by every comparison in float64."""
    means = [np.mean([VECTORS[WORDS.index(word)] for word in text.split()] or [VECTORS[0]], 0, float) for text in texts]
    stay: list[int] = []
    found = []
    for at, mean in enumerate(means):
        cosines = [mean @ means[each] / (np.linalg.norm(mean) * np.linalg.norm(means[each]) or 1) for each in stay]
        if cosines and max(cosines) >= threshold:
            found.append((at, stay[int(np.argmax(cosines))]))
        else:
            stay.append(at)
    return found


@pytest.mark.parametrize("block", [1, 3, 500])
def test_what_is_found_is_what_every_comparison_finds(
    folder: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semantic, "BLOCK", block)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[1:], size=rng.integers(0, 4))) for _ in range(60)]
    found = list(find_alike(texts, load(folder), 0.98))
    assert [row for row, _, _ in found] == [row for row, _ in oracle(texts, 0.98)]
    assert all(0.98 <= cosine <= 1 and witness < row for row, witness, cosine in found)
    assert {witness for _, witness, _ in found}.isdisjoint(row for row, _, _ in found)


def test_rows_are_compared_with_those_of_the_window_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "BLOCK", 1)
    texts = ["big dog", "red", "green", "large hound"]
    assert [row for row, _, _ in find_alike(texts, load(folder), 0.98)] == [3]
    monkeypatch.setattr(semantic, "WINDOW", 2)
    assert list(find_alike(texts, load(folder), 0.98)) == []


def chat(prompt: str, answer: str) -> Conversation:
    turns: Any = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Conversation(messages=turns, where=prompt)


@pytest.mark.parametrize(
    ("action", "kept"), [(Action.count, [0, 1, 2]), (Action.drop, [0, 2]), (Action.ignore, [0, 1, 2])]
)
def test_rows_are_counted_and_dropped_when_told(folder: Path, action: Action, kept: list[int]) -> None:
    config = PrepareConfig(semantic=SemanticConfig(model=str(folder), action=action))
    rows = [chat("big dog", "it barks"), chat("large hound", "he runs"), chat("red", "a colour")]
    ledger = Preparation(trained=rows, config=config, judges={}).run()
    assert ledger.kept() == kept
    assert [each.witness for each in ledger.found.get(1, ())] == ([] if action is Action.ignore else [0])


def test_a_folder_without_a_model_and_a_missing_package_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setting_problem(PrepareConfig(semantic=SemanticConfig(model=str(folder)))) is None
    problem = setting_problem(PrepareConfig(semantic=SemanticConfig(model=str(tmp_path))))
    assert problem is not None
    assert "holds no config.json" in problem[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = setting_problem(PrepareConfig(semantic=SemanticConfig(model=str(folder))))
    assert problem is not None
    assert problem[2] == "pip install 'posttrain[semantic]'"
