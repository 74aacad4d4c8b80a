"""Watch over a stranger's tokenizer: its patterns are a program, in compiled code that no signal interrupts.

The process that supervises this one ends it when a text takes too long or takes the process down, and names the folder.
What is slow on every text is rejected here, once it has had its time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError, first_line, reject
from posttrain.host import activity
from posttrain.host.activity import Activity
from posttrain.model.trust import OTHER
from posttrain.tokens.codec import WATCH

SECONDS = 60.0
"""Seconds for a tokenizer, beyond those for its characters."""
CHARACTERS = 10_000
"""Characters in each further second: a hundredth of what sound tokenizers take."""
GROWTH = 100
"""Times that the replacements of a normaliser or decoder may lengthen a text, each at the most of its places."""
PROBES = ("a" * 1000, " " * 1000, "1" * 1000, "\n" * 1000, "Aé日本\N{GRINNING FACE} _-.,\t" * 100)
"""Texts on which a pattern with nested repetitions takes its time."""


class TokenizerWatch:
    """The time and the characters of one tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seconds, self._characters = 0.0, 0

    def guard(self, tokenizer: Any) -> None:
        """Watch every text and every list of ids that ``tokenizer`` is given, and try it with PROBES.

        Raises BadInput when it takes too long or makes too much, as each later call does.
        """
        self._check_growth(tokenizer)
        for name in ("_encode_plus", "_decode"):  # below all of its methods; on itself: it is handed to libraries
            vars(tokenizer)[name] = partial(self._call, getattr(tokenizer, name))
        vars(tokenizer)[WATCH] = self.watching
        for text in PROBES:
            try:
                tokenizer(text)
            except PosttrainError:
                raise
            except Exception:  # a text that it cannot express is no fault, until there is one
                continue

    @contextmanager
    def watching(self, characters: int) -> Iterator[None]:
        """Limit the time of the body, which works on so many characters."""
        self._characters += characters
        limit = SECONDS + characters / CHARACTERS
        call = f"a text of {characters:,} characters or tokens"
        began = time.thread_time()  # other threads may be generating meanwhile
        try:
            with activity.calling(Activity(file=str(self._folder), call=call, silence_limit=limit)):
                yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # compiled code raises it beside all of Python's exceptions
                raise
            reject(str(self._folder), f"its tokenizer fails at {call}: {first_line(error)}", OTHER)
        self._seconds += time.thread_time() - began
        if self._seconds > SECONDS + self._characters / CHARACTERS:
            what = (
                f"its tokenizer took {self._seconds:.0f} s of computing for {self._characters:,} characters or tokens"
            )
            reject(str(self._folder), what, OTHER)

    def _call(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        texts = [*given, options.get("text"), options.get("token_ids")]
        with self.watching(sum(map(_length, texts))):
            return function(*given, **options)

    def _check_growth(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        for part in ("normalizer", "decoder"):
            if (found := getattr(backend, part, None)) is None:
                continue
            if (times := _growth(json.loads(found.__getstate__()))) > GROWTH:
                reject(str(self._folder), f"the {part} of its tokenizer makes texts {times:,.0f} times as long", OTHER)


def _length(given: Any) -> int:
    """Return the characters of a text, of several, or the number of ids."""
    if isinstance(given, list | tuple) and given and isinstance(given[0], str | list | tuple):
        return sum(map(_length, given))
    return len(given) if isinstance(given, Sized) else 0


def _growth(part: Mapping[str, Any]) -> float:
    """Return how many times longer a text may become by the replacements in a normaliser or decoder."""
    if part.get("type") == "Replace":
        return max(1.0, len(part["content"]) / max(1, len(part["pattern"].get("String", ""))))
    inner = 1.0
    for each in part.get("normalizers") or part.get("decoders") or ():
        inner *= _growth(each)
    return inner
