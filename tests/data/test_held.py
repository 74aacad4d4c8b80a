"""Records that are let go and read again, and their digest."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from posttrain.data.held import HeldRecords, digest_records, release
from posttrain.data.records import Conversation, Feedback, Origin, Record, Text
from posttrain.errors import BadInput

CHAT = Conversation(
    messages=({"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "c", "train": True}), where="x:1"
)
RECORDS: list[Record] = [CHAT, Text(text="b", where="x:2", unread=("id",))]


class Kind(enum.StrEnum):
    user = "user"


def with_value(value: Any) -> list[Record]:
    return [replace(CHAT, messages=({"role": "user", "content": "a", "key": value},))]


def test_records_are_read_again_once_they_were_let_go() -> None:
    reads: list[int] = []

    def read() -> Sequence[Record]:
        reads.append(1)
        return list(RECORDS)

    held = HeldRecords.of(read)
    assert (list(held), held[0], held[-1:], len(held)) == (RECORDS, RECORDS[0], RECORDS[-1:], 2)
    assert len(reads) == 1
    release(held)
    assert (len(held), digest_records(held)) == (2, digest_records(RECORDS))
    assert len(reads) == 1, "number and digest are known"
    assert list(held) == RECORDS
    assert held[1] is held[1]
    assert len(reads) == 2


@pytest.mark.parametrize("changed", [RECORDS[:1], [*reversed(RECORDS)], [CHAT, replace(RECORDS[1], where="x:3")]])
def test_other_records_than_those_that_were_checked_are_rejected(changed: list[Record]) -> None:
    found = list(RECORDS)
    held = HeldRecords.of(lambda: list(found), "sft.data")
    held.release()
    found[:] = changed
    with pytest.raises(BadInput, match=r"sft\.data: the data changed after it was checked"):
        list(held)


def test_the_digest_tells_any_two_records_apart() -> None:
    rated = Feedback(prompt=CHAT.messages[:1], completion=CHAT.messages[1:], label=True, where="x:1")
    moved = replace(CHAT, origin=Origin(number=1, path="data"))
    lists: list[list[Record]] = [
        [], [CHAT], [CHAT, CHAT], RECORDS, RECORDS[::-1], [rated], [replace(rated, label=False)], [moved],
        [replace(CHAT, origin=replace(moved.origin, share=0.5))], [replace(CHAT, where="x:11")],
        [replace(CHAT, messages=CHAT.messages[:1])], [replace(CHAT, tools=({"name": "a"},))],
        *map(with_value, ("1", 1, 1.0, True, None, [1], {"a": 1}, {"a": [1]}, b"1", {1})),
    ]  # fmt: skip
    digests = [digest_records(each) for each in lists]
    assert len(set(digests)) == len(digests)


def test_equal_values_of_other_types_have_one_digest() -> None:
    assert digest_records(with_value(OrderedDict(a=[Kind.user]))) == digest_records(with_value({"a": ["user"]}))
    one, other = (with_value("".join(["long ", "text"])) for _ in range(2))
    assert digest_records([*one, *one]) == digest_records([*one, *other]), "whether they are one object or two"
