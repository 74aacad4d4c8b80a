"""A filter that drops conversations with short answers, in every stage."""

from collections.abc import Generator, Sequence

from posttrain import Conversation, Record, Step, hookimpl

SHORTEST = 20


def is_short(record: Record) -> bool:
    """Return True for a conversation whose last turn has fewer than SHORTEST characters."""
    return isinstance(record, Conversation) and len(record.messages[-1]["content"] or "") < SHORTEST


@hookimpl(wrapper=True)
def load_records(step: Step) -> Generator[None, Sequence[Record] | None, Sequence[Record] | None]:
    """Drop short answers from the records of any plugin."""
    records = yield
    return records and [record for record in records if not is_short(record)]
