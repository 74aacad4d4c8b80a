"""Texts as token ids, and ids as text: by the library behind a tokenizer, without the detours of transformers."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from operator import itemgetter
from typing import Any

WATCH = "_watch"
"""Attribute of a tokenizer with the context in which it may work on so many characters; set where it is loaded."""
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""Sign for bytes that are no whole character."""


def encode(tokenizer: Any, text: str, *, whole: bool = False) -> list[int]:
    """Return the ids of ``text``; with ``whole``, including the tokenizer's tokens around a text."""
    return encode_all(tokenizer, [text], whole=whole)[0]


def encode_all(tokenizer: Any, texts: Sequence[str], *, whole: bool = False) -> list[list[int]]:
    """Return the ids of each of ``texts``; with ``whole``, including the tokenizer's tokens around a text."""
    backend = _plain_backend(tokenizer, "_encode_plus")
    if backend is not None and not (backend.truncation or backend.padding or backend.encode_special_tokens):
        # transformers asks for the place of every token in the text as well: two fifths of the time
        with _watching(tokenizer, sum(map(len, texts))):
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=whole)]
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=whole, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of ``ids``, special tokens included, as it is."""
    # transformers looks at every id in Python before it decodes: most of the time of a proof
    if (backend := _plain_backend(tokenizer, "decode", "_decode")) is not None:
        with _watching(tokenizer, len(ids)):
            return _token_texts(backend).join(ids)
    return str(tokenizer.decode([*ids], clean_up_tokenization_spaces=False))


class TokenTexts:
    """The texts of single tokens, each decoded once.

    The decoder of bytes writes those of its tokens side by side. So the text of tokens that are whole characters is
    their texts side by side; the library decodes any others together, and all of any other decoder.
    """

    def __init__(self, backend: Any) -> None:
        """Take the library's tokenizer."""
        from tokenizers.decoders import ByteLevel

        self._backend = backend
        size = backend.get_vocab_size() if isinstance(backend.decoder, ByteLevel) else 0
        self._texts: list[str | None] = [None] * size
        self._parts: set[int] = set()
        """Tokens that are no whole characters."""

    def join(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``."""
        if self._texts and ids:
            with contextlib.suppress(TypeError, IndexError):  # of a token without a text, or of none of the vocabulary
                return self._joined(ids)
            if self._learn(set(ids)):
                return self._joined(ids)
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def _joined(self, ids: Sequence[int]) -> str:
        return "".join(itemgetter(*ids)(self._texts))

    def _learn(self, ids: set[int]) -> bool:
        """Decode each token that is not known yet; return whether all have texts."""
        if max(ids) >= len(self._texts) or not self._parts.isdisjoint(ids):
            return False
        for token in ids:
            if self._texts[token] is None:
                text = str(self._backend.decode([token], skip_special_tokens=False))
                if NO_CHARACTER in text:
                    self._parts.add(token)
                else:
                    self._texts[token] = text
        return self._parts.isdisjoint(ids)


@lru_cache(maxsize=8)
def _token_texts(backend: Any) -> TokenTexts:
    return TokenTexts(backend)


def _watching(tokenizer: Any, characters: int) -> contextlib.AbstractContextManager[None]:
    """Return the watch over a stranger's tokenizer, whose compiled code is called here without its own methods."""
    watch: Callable[[int], contextlib.AbstractContextManager[None]] = vars(tokenizer).get(WATCH, contextlib.nullcontext)
    return watch(characters)


def _plain_backend(tokenizer: Any, *methods: str) -> Any | None:
    """Return the tokenizer of the library behind ``tokenizer``; None where the class has ``methods`` of its own."""
    kind: Any = type(tokenizer)
    is_plain = _is_plain(kind, methods) and not tokenizer.split_special_tokens
    return tokenizer.backend_tokenizer if is_plain else None


@cache  # asked for every text, twenty times a conversation
def _is_plain(kind: Any, methods: tuple[str, ...]) -> bool:
    from transformers import TokenizersBackend

    return all(getattr(kind, name, None) is getattr(TokenizersBackend, name) for name in ("__call__", *methods))


def without_space(text: str) -> str:
    """Return text without compatibility forms and whitespace, both lost in some tokenizers."""
    return "".join(unicodedata.normalize("NFKC", text).split())
