"""Texts of token ids: those of the library itself, whatever its decoder."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.records import Conversation
from posttrain.tokens.chat import Rendered
from posttrain.tokens.codec import TokenTexts, decode
from posttrain.tokens.masks import MaskProof
from tests.support.chat_templates import make_tokenizer, sentencepiece

NAMES = ("bytes", "words", "always", "first", "never")
WRITTEN = ["Hello world, and again.", "日本語 é ﬁ ☃ 👍🏽 �", "<|im_end|>\n\t  x"]


@cache
def tokenizer_of(name: str) -> Any:
    if name == "words":
        return make_tokenizer(None)
    if name != "bytes":
        return sentencepiece(name)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(WRITTEN * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("name", NAMES)
@given(numbers=st.lists(st.integers(0, 10_000), max_size=30))
def test_any_ids_have_the_text_that_the_library_gives_them(name: str, numbers: list[int]) -> None:
    tokenizer = tokenizer_of(name)
    ids = [number % len(tokenizer) for number in numbers]
    for _ in range(2):  # the second time, the tokens are known
        assert decode(tokenizer, ids) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(max_size=30))
def test_a_text_comes_back_as_from_the_library(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    for each in (text, *WRITTEN):
        ids = tokenizer.encode(each)
        assert decode(tokenizer, ids) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def test_an_id_of_none_of_the_tokens_is_left_to_the_library() -> None:
    tokenizer = tokenizer_of("bytes")
    ids = [*tokenizer.encode("Hello"), len(tokenizer) + 7]
    assert decode(tokenizer, ids) == tokenizer.backend_tokenizer.decode(ids) == "Hello"


def test_known_tokens_need_the_library_no_more() -> None:
    tokenizer = tokenizer_of("bytes")
    calls: list[Any] = []

    class Counted:
        decoder = tokenizer.backend_tokenizer.decoder

        def get_vocab_size(self) -> int:
            return len(tokenizer)

        def decode(self, ids: list[int], **options: Any) -> str:
            calls.append(ids)
            return str(tokenizer.backend_tokenizer.decode(ids, **options))

    texts, ids = TokenTexts(Counted()), tokenizer.encode("Hello world, and again.")
    first = texts.join(ids)
    calls.clear()
    assert (texts.join(ids), calls) == (first, [])


@pytest.mark.parametrize("content", ["\u0338ab", "\u0301ab"])
def test_a_mark_that_belongs_to_the_character_before_an_answer_is_a_fault(content: str) -> None:
    tokenizer = tokenizer_of("bytes")
    record = Conversation(
        messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": content}), where="a.jsonl:1"
    )
    asked, said = tokenizer.encode("hi "), tokenizer.encode("a>"[content == "\u0338ab"] + content + "<|im_end|>")
    rendered = Rendered(asked + said, [False] * len(asked) + [True] * len(said), "")
    assert "is not trained as a whole" in str(MaskProof(tokenizer).fault(record, rendered))
