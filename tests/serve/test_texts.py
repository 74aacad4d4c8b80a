"""The text of an answer, piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from posttrain.serve.prompts import Prompter, Text
from tests.support.chat_templates import make_tokenizer
from tests.support.tiny import TEMPLATE

TEXTS = st.text(alphabet="ab é漢🙂\n", max_size=20)


@pytest.fixture(scope="module")
def prompter() -> Any:
    return Prompter(make_tokenizer(TEMPLATE))


def pieces(prompter: Prompter, text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], Text]:
    found, parts = Text(prompter, stops), []
    for token in prompter.tokenizer(text, add_special_tokens=False)["input_ids"]:
        parts.append(found.add(token))
        if found.stopped:
            return parts, found
    return [*parts, found.end()], found


@given(text=TEXTS)
def test_pieces_make_the_text_and_no_character_is_cut(prompter: Any, text: str) -> None:
    ids = prompter.tokenizer(text, add_special_tokens=False)["input_ids"]
    parts, _ = pieces(prompter, text)
    assert "".join(parts) == prompter.text(ids)
    assert not any("�" in part for part in parts)


@example(text="aba", stops=["b", "aba"])
@example(text=" aa", stops=["a", " aa"])
@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), min_size=1, max_size=3))
def test_no_part_of_a_stop_text_is_sent(prompter: Any, text: str, stops: list[str]) -> None:
    whole = prompter.text(prompter.tokenizer(text, add_special_tokens=False)["input_ids"])
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    parts, found = pieces(prompter, text, tuple(stops))
    assert "".join(parts) == (whole[: min(ends)[1]] if ends else whole)  # the first to be complete, however it is cut
    assert found.stopped == bool(ends)
