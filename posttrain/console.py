"""The console of tables, bars and coloured lines: what it prints is data, and only a style gives a colour."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from posttrain.quoting import Quoted, lines, one_line


class DataConsole(Console):
    """A console for which brackets are brackets, and in which no text reaches the terminal unquoted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream of the terminal itself, below the one that quotes."""
        stream = super().file
        return stream.below if isinstance(stream, Quoted) else stream

    @file.setter
    def file(self, stream: IO[str]) -> None:
        """Print to another stream."""
        self._file = stream

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text as it will be shown, quoted before its width is measured."""
        return super().render_str(lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the pieces of anything that is printed, their texts quoted."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(lines(segment.text), segment.style)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Return one line of texts, each alone or with its style."""
    return Text.assemble(
        *((one_line(part), "") if isinstance(part, str) else (one_line(part[0]), part[1]) for part in parts)
    )
