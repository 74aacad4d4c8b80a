"""A reward model's scores are those of transformers for each conversation alone, whatever is scored beside it."""

# T = tokens

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from posttrain.data.questions import read_question
from posttrain.errors import BadInput
from posttrain.model.reward_model import TOO_LONG, UNHELD, reward_model
from posttrain.rewards.reward import Attempt
from posttrain.rewards.scorer import Rated, Scorer, choose
from posttrain.testing import tiny_tokenizer
from posttrain.testing.tiny import VOCABULARY


def write(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {"initializer_range": 0.2, "max_position_embeddings": 64, "num_labels": 1, "eos_token_id": 3, **settings}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCABULARY, **shape, **values)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def scorer_of(path: Path, **settings: Any) -> Scorer:
    given = {"reward_model": {"path": str(path), **settings}}
    return choose(given, {"reward_model": reward_model()}, {"reward_model": "us"})


def rate(scorer: Scorer, *texts: str) -> list[Rated]:
    asked = read_question({"question": "six?"}, "q.jsonl:1")
    return scorer.rate([Attempt(question=asked, text=text, ended=True) for text in texts])


def test_scores_are_those_of_transformers_for_each_conversation_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "judge")
    texts = ["6", "seven", "it is six, I think", "no"]
    found = rate(scorer_of(folder, batch_size=3), *texts)
    exact = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    for text, each in zip(texts, found, strict=True):
        turns = [{"role": "user", "content": "six?"}, {"role": "assistant", "content": text}]
        ids_T = tiny_tokenizer().apply_chat_template(turns, return_dict=False)
        with torch.no_grad():
            assert each.reward == pytest.approx(float(exact(torch.tensor([ids_T])).logits[0, 0]), abs=1e-5)
    assert len({each.reward for each in found}) == len(texts)


def test_what_the_model_cannot_read_has_no_reward_and_is_named(tmp_path: Path) -> None:
    found = rate(scorer_of(write(tmp_path / "judge")), "6", "<|end|>", "x" * 80)
    assert [each.notes.get("reward_model", "") for each in found] == ["", UNHELD, TOO_LONG]
    assert [each.reward is None for each in found] == [False, True, True]


def test_the_weights_name_the_scores(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b", initializer_range=0.1)
    names = [scorer_of(folder).identities()["reward_model"] for folder in (first, first, second)]
    assert names[0] == names[1] != names[2]


def test_a_model_that_is_no_reward_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="with 2 outputs is no reward model"):
        scorer_of(write(tmp_path / "two", num_labels=2)).identities()
    folder = write(tmp_path / "one")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(BadInput, match="LlamaForCausalLM with 1 outputs is no reward model"):
        scorer_of(folder).identities()
    with pytest.raises(BadInput):
        scorer_of(tmp_path / "absent").identities()
