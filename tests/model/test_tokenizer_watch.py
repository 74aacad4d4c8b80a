"""The watch over a stranger's tokenizer: nothing reaches its compiled code past it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from posttrain.data.records import Conversation
from posttrain.model.tokenizer_watch import TokenizerWatch
from posttrain.tokens.chat import ChatRenderer
from posttrain.tokens.codec import decode, encode
from tests.support.tiny import tiny_tokenizer


def test_texts_and_ids_are_watched_wherever_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = TokenizerWatch.watching

    @contextmanager
    def watching(self: TokenizerWatch, characters: int) -> Iterator[None]:
        seen.append(characters)
        with original(self, characters):
            yield

    monkeypatch.setattr(TokenizerWatch, "watching", watching)
    tokenizer = tiny_tokenizer()
    TokenizerWatch(Path("stranger")).guard(tokenizer)
    for ask in (
        lambda: encode(tokenizer, "a b c"),
        lambda: encode(tokenizer, "a b c", whole=True),
        lambda: decode(tokenizer, [4, 5, 6, 7, 4, 5]),
        lambda: tokenizer.encode("a b c"),
        lambda: tokenizer.decode([4, 5, 6]),
        lambda: tokenizer.batch_decode([[4, 5, 6]]),
    ):
        seen.clear()
        ask()
        assert seen
    seen.clear()
    turns = ({"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"})
    rendered = ChatRenderer(tokenizer).conversation(Conversation(messages=turns, where="a"))
    assert max(seen) >= len(rendered.text)
