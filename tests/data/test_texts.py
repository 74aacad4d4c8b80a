"""Raw text: read only where it is asked for, every token trained but the first, ended like any other text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from posttrain.config.schema import Format, Source
from posttrain.data.reading import read_source
from posttrain.data.records import Record, Text
from posttrain.errors import BadInput
from posttrain.tokens.chat import ChatRenderer, Rendered
from posttrain.tokens.masks import MaskProof
from tests.support.tiny import TEMPLATE, tiny_tokenizer

RENDERER = ChatRenderer(tiny_tokenizer())
END = "<|end|>"


def read(path: Path, form: Format = Format.text, shape: str = "documents", **options: Any) -> list[Record]:
    return list(read_source(Source(path=str(path), format=form, **options), shape))


def text(said: str) -> Text:
    return Text(text=said, where="books.jsonl:3")


def decoded(rendered: Rendered, *, trained: bool) -> str:
    pairs = zip(rendered.ids, rendered.mask, strict=True)
    return str(tiny_tokenizer().decode([token for token, mask in pairs if mask or not trained]))


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_a_line_or_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\n\nstill one", "source": "web"}) + "\n")
    (tmp_path / "b.txt").write_text("first paragraph\n\nsecond\n")
    row = Text(text="one\n\nstill one", where=f"{tmp_path}/a.jsonl:1", unread=("source",))
    assert read(tmp_path / "a.jsonl") == [row]
    assert read(tmp_path / "b.txt") == [Text(text="first paragraph\n\nsecond\n", where=f"{tmp_path}/b.txt")]


def test_a_directory_of_text_files_is_a_source_but_notes_beside_data_are_not(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    assert [record.text for record in read(tmp_path) if isinstance(record, Text)] == ["one", "two"]
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": "three"}))
    assert read(tmp_path, columns={"text": "body"}) == [Text(text="three", where=f"{tmp_path}/c.jsonl:1")]


def test_raw_text_has_to_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(BadInput, match=r"a\.txt: unknown shape.*\n.*To train every token.*format: text"):
        read(tmp_path / "a.txt", Format.auto)


@pytest.mark.parametrize("shape", ["conversations", "preferences"])
def test_stages_that_want_no_documents_get_no_text(tmp_path: Path, shape: str) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(BadInput, match=f"shape text, but the stage needs {shape}"):
        read(tmp_path / "a.txt", shape=shape)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no records"),
        (b" \n", "holds no records"),
        (b"caf\xe9", ":1: is not UTF-8: byte 0xe9"),
        ("wide".encode("utf-16"), ":1: is not UTF-8: byte 0xff"),
    ],
)
def test_text_files_that_hold_no_text_are_rejected(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(BadInput, match=message):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("value", [None, "", " \n", 3, ["a"]])
def test_a_record_without_text_is_rejected_by_its_line(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"text": value}))
    with pytest.raises(BadInput, match=r"a\.jsonl:2: text: content"):
        read(tmp_path / "a.jsonl")


# --- Tokens -----------------------------------------------------------------------------------------------------------


@given(st.text("abc xyz\n", min_size=1, max_size=60))
def test_every_token_but_the_first_is_trained_and_the_end_with_it(said: str) -> None:
    rendered = RENDERER.document(text(said))
    assert decoded(rendered, trained=False) == said + END
    assert rendered.mask == [False] + [True] * (len(rendered.ids) - 1)
    assert rendered.where == "books.jsonl:3"
    assert MaskProof(tiny_tokenizer()).fault(text(said), rendered) is None


@pytest.mark.parametrize("pattern", ["<|system|> $A", "<|system|> $A <|end|>"])
def test_texts_begin_as_the_tokenizer_begins_them_and_end_once(pattern: str) -> None:
    tokenizer = tiny_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|system|>", END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=special)
    rendered = ChatRenderer(tokenizer).document(text("hi"))
    assert decoded(rendered, trained=False) == f"<|system|>hi{END}"
    assert decoded(rendered, trained=True) == f"hi{END}"


def test_special_tokens_in_a_text_are_rejected() -> None:
    with pytest.raises(BadInput, match=r"books\.jsonl:3: the text holds the special token '<\|end\|>'"):
        RENDERER.document(text("one<|end|>two"))


def test_without_an_end_of_sequence_token_texts_are_rejected() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert tokenizer.chat_template == TEMPLATE
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        ChatRenderer(tokenizer).document(text("hi"))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda r: Rendered(r.ids, [False, False, *r.mask[2:]], r.text), "not every token"),
        (lambda r: Rendered(r.ids[:-1], r.mask[:-1], r.text), "end-of-sequence"),
        (lambda r: Rendered([r.ids[1], *r.ids[1:]], r.mask, r.text), "not the text"),
    ],
)
def test_a_wrong_mask_of_a_text_is_found(spoil: Any, fault: str) -> None:
    found = MaskProof(tiny_tokenizer()).fault(text("hi"), spoil(RENDERER.document(text("hi"))))
    assert found is not None
    assert fault in found
