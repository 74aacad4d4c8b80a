r"""Answers of mathematics: the last ``\boxed{...}`` of a text, compared with the right answer by math-verify.

The comparison is another process's, one line of JSON each way: what takes too long is ended with that process, in
whatever thread the reward is asked, and what a text makes the parser do reaches nothing here.

    {"gold": ["\\frac{1}{2}"], "text": "so \\boxed{0.5}"}  ->  {"value": 1.0, "note": ""}
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import BadInput, Problem
from posttrain.host import activity
from posttrain.rewards.reward import Attempt, Reward, Score, Scores

if TYPE_CHECKING:
    from posttrain.data.records import Question

SECONDS = 10.0
"""Longest comparison."""
START_SECONDS = 120.0
"""Longest start of the process that compares."""
MEMORY = 4 << 30
"""Bytes of address space of that process."""
MOST_CHARACTERS = 1000
"""Longest formula that is read."""
NO_BOX = r"no \boxed{...} in it"
UNREADABLE = r"the content of \boxed{...} cannot be read as mathematics"
TOO_LONG = f"not compared within {SECONDS:.0f} seconds"
PACKAGE = "Install it: pip install 'posttrain[maths]'"
_UNIT = re.compile(
    r"\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{\s*([^{}]*?)\s*\}\s*(\^\{?-?\d+\}?)?|(?<=[\d}])\s+([A-Za-z]+(?:\^\d)?)$"
    r"|(\\?%)"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def box(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` with balanced braces; None when there is none."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            escaped = place > 0 and text[place - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place].strip()
    return None


def unit(formula: str) -> str:
    """Return the unit of a formula, such as ``cm`` or ``%``; empty without one."""
    found = ["".join(part or "" for part in match.groups()) for match in _UNIT.finditer(formula)]
    return re.sub(r"[\\\s{}.]", "", "".join(found)).casefold()


class Comparer:
    """The process that compares; it is started when first asked, and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, gold: Sequence[str], text: str) -> Score:
        """Return the score of a text, None for a right answer that cannot be read."""
        try:
            given = self._ask({"gold": list(gold), "text": text}, SECONDS)
        except TimeoutError:
            return Score(value=0.0, note=TOO_LONG)
        return Score(value=given["value"], note=given["note"])

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], seconds)[0]:
                raise TimeoutError
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self._end(process)
            raise
        if not line.endswith(b"\n"):
            self._end(process)  # memory ran out, or the parser fell into its own recursion
            return {"value": 0.0, "note": UNREADABLE}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "posttrain.rewards.maths"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        if not ready or process.stdout.readline() != b"ready\n":
            self._end(process)
            raise RuntimeError("the process that compares mathematics did not start")
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        self._process = None


def maths() -> Reward:
    """Return the reward."""
    compare = Comparer()

    def lacks(question: Question) -> str | None:
        if not question.answers:
            return "has no answer"
        for answer in question.answers:
            found = compare([str(answer)], r"\boxed{0}")
            if found.value is None or found.note == TOO_LONG:
                return f"has the answer {answer!r:.80}, which cannot be read as mathematics"
        return None

    def opened(settings: Any, kept: Path) -> Scores:
        return lambda attempts: [_score(compare, each) for each in attempts]

    return Reward(
        name="maths",
        summary=r"1 for a text whose last \boxed{...} equals the answer as mathematics, in the same unit",
        version=1,
        open=opened,
        lacks=lacks,
        prepare=_prepare,
    )


def _score(compare: Callable[[Sequence[str], str], Score], attempt: Attempt) -> float | Score:
    activity.sign_of_life()  # thousands are compared in one call
    return compare([str(each) for each in attempt.question.answers], attempt.text) if attempt.ended else 0.0


def _prepare(settings: Any) -> str:
    """Return the version of math-verify. Raises BadInput when it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"math-verify {version('math-verify')}"
    except PackageNotFoundError:
        what = "the reward maths needs the package math-verify, which is not installed"
        raise BadInput(Problem(where="reward", what=what, fix=PACKAGE)) from None


def _answer_lines() -> None:
    """Compare what comes in, line by line, until no more comes."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    _parse("0")
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        value, note = _compare(asked["gold"], asked["text"])
        print(json.dumps({"value": value, "note": note}), flush=True)


def _compare(gold: Sequence[str], text: str) -> tuple[float | None, str]:
    from math_verify import verify

    right = [box(each) or each for each in gold]
    read = [_parse(each) for each in right]
    if not all(read):
        return None, "the right answer cannot be read as mathematics"
    if (given := box(text)) is None:
        return 0.0, NO_BOX
    if not (found := _parse(given)):
        return 0.0, UNREADABLE
    own = unit(given)
    for each, parsed in zip(right, read, strict=True):
        wanted = unit(each)
        if (not own or not wanted or own == wanted) and verify(parsed, found, timeout_seconds=None):
            return 1.0, ""
    return 0.0, ""


def _parse(formula: str) -> list[Any]:
    """Return what math-verify reads in a formula without its percent sign; nothing in one that it cannot read."""
    from math_verify import LatexExtractionConfig, parse

    if not formula or len(formula) > MOST_CHARACTERS:
        return []
    plain = re.sub(r"\\?%", "", formula).replace("−", "-")
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    found = parse(rf"$\boxed{{{plain}}}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    return list(found)


if __name__ == "__main__":
    _answer_lines()
