"""Settings of replay: general records trained beside a stage's own, so that it forgets less of what it knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from posttrain.config.ranges import number, out_of_range
from posttrain.config.schema import Source


@dataclass(kw_only=True)
class AutoShare:
    """Shares to be tried, from the least upwards, until the guards of the stage's gate hold."""

    least: float = number(0.05, above=0, below=1)
    """Share of the first attempt."""
    most: float = number(0.4, above=0, below=1)
    """Share of the last attempt."""
    attempts: int = number(3, least=1, most=20)
    """Most attempts, each of which trains the stage; their shares grow by equal factors."""

    def shares(self) -> list[float]:
        """Return the share of every attempt."""
        steps = max(self.attempts - 1, 1)
        return [round(self.least * (self.most / self.least) ** (step / steps), 6) for step in range(self.attempts)]


@dataclass(kw_only=True)
class Replay(Source):
    """A source of general records with its share of the stage's tokens, given or to be found."""

    auto: AutoShare | None = None
    """Search for the share, in place of ``share``."""

    @property
    def shares(self) -> Sequence[float]:
        """Shares to be tried, in their order."""
        return [self.share or 0.0] if self.auto is None else self.auto.shares()

    def source(self, share: float) -> Source:
        """Return the source that has this share of the tokens."""
        given = {each.name: getattr(self, each.name) for each in fields(Source)}
        return Source(**given | {"share": share})

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the shares, with its setting."""
        if (self.share is None) == (self.auto is None):
            given = "neither share nor auto" if self.auto is None else "both share and auto"
            yield "", f"has {given}: give share=0.1, or auto to search for it"
        if self.auto is not None:
            yield from ((f".auto.{key}", what) for key, what in out_of_range(self.auto))
            if self.auto.least > self.auto.most:
                yield ".auto.most", f"is {self.auto.most:g}, less than least, {self.auto.least:g}"
