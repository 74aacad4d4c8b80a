"""A format of files: a question on a line that begins with Q:, its answer on the next one, with A:."""

from collections.abc import Iterator, Sequence
from typing import BinaryIO

from posttrain import Reader, hookimpl


def read(file: BinaryIO) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yield the line of each answer with its record, or with the reason why it is none."""
    question = ""
    for number, line in enumerate(file, start=1):
        mark, _, text = line.decode("utf-8", "replace").strip().partition(": ")
        if mark == "Q":
            question = text
        elif mark == "A" and question:
            yield number, {"prompt": question, "completion": text}
        elif mark:
            yield number, "is neither a question nor an answer to one"


@hookimpl
def register_readers() -> Sequence[Reader]:
    """Add the format; ``sft.data=chats.qa`` then trains on such a file."""
    return [Reader(name="qa", suffix=".qa", version="1", read=read)]
