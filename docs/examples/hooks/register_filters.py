"""A rule on rows: answers that shout."""

from collections.abc import Sequence

from posttrain import Filter, Finding, Row, hookimpl

SHARE = 0.5


class Shouting:
    """Finds answers of which half of the letters or more are capitals."""

    name = "shouting"
    version = "1"

    def judge(self, rows: Sequence[Row]) -> Sequence[Finding | None]:
        """Return a finding or None for each row."""
        return [self.find(row.answer) for row in rows]

    def find(self, answer: str) -> Finding | None:
        """Return the share of capitals when it is too large."""
        letters = [letter for letter in answer if letter.isalpha()]
        share = sum(letter.isupper() for letter in letters) / max(len(letters), 1)
        return Finding(evidence=answer[:80], score=share) if share >= SHARE else None


@hookimpl
def register_filters() -> Sequence[Filter]:
    """Add the rule; a recipe drops the rows by ``sft.prepare.rules.shouting: drop``."""
    return [Shouting()]
