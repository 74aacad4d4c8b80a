r"""Answers that are programs: the values of a question's tests, found in the sandbox and compared outside it.

The right values never enter the sandbox, so a program cannot print that it passed: it has to give them. A question has
its tests in its meta, ``assert CALL == VALUE`` with a literal value, or the input of a whole program with its output:

    {"question": "...", "meta": {"tests": ["assert add(1, 2) == 3", {"input": "1 2\n", "output": "3\n"}]}}
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.environment import cores
from posttrain.errors import BadInput, Problem
from posttrain.host import activity, consent
from posttrain.rewards.reward import Attempt, Reward, Score, Scores

if TYPE_CHECKING:
    from posttrain.data.records import Question

TESTS = "tests"
"""Key of a question's meta with its tests."""
CONSENT = "reward"
"""Name of the rewards' programs in the user's own file of consent."""
WHOLE = {"input": str, "output": str}
"""Keys of a test by the output of a whole program."""
NO_PROGRAM = "no program in it"
ENDED_EARLY = "the program ended before its tests"
FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_UNREADABLE = (ValueError, SyntaxError, MemoryError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One test of a program."""

    call: str | None
    """Expression whose value is compared; None for a test by the output of the whole program."""
    given: str | None
    """Input of the program."""
    right: Any
    """Right value, or right output."""


def read_test(given: Any) -> Test:
    """Return a test as a question has it. Raises ValueError for one that is neither form."""
    if isinstance(given, dict) and {name: type(each) for name, each in given.items()} == WHOLE:
        return Test(call=None, given=given["input"], right=given["output"])
    try:
        (line,) = ast.parse(given.strip() if isinstance(given, str) else "").body
        if isinstance(line, ast.Assert):
            return _read_assertion(line.test)
        raise ValueError("no assertion")
    except _UNREADABLE as error:
        raise ValueError("neither assert CALL == VALUE with a literal value, nor {input, output}") from error


def program_of(text: str) -> str:
    """Return the last block of code of an answer, or all of an answer without one."""
    blocks = FENCE.findall(text)
    return str(blocks[-1]) if blocks else text


def code() -> Reward:
    """Return the reward."""

    def opened(settings: Any, kept: Path) -> Scores:
        def scores(attempts: Sequence[Attempt]) -> list[float | Score]:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(cores()) as threads:
                return list(threads.map(_score, attempts))

        return scores

    return Reward(
        name="code",
        summary=f"1 for a Python program that passes every test of meta.{TESTS}, run in a sandbox; needs your consent",
        version=1,
        open=opened,
        lacks=_lacks,
        prepare=_prepare,
    )


def _read_assertion(test: ast.expr) -> Test:
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
        return Test(call=ast.unparse(test.left), given=None, right=ast.literal_eval(test.comparators[0]))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return Test(call=f"bool({ast.unparse(test.operand)})", given=None, right=False)
    if isinstance(test, ast.Call):
        return Test(call=f"bool({ast.unparse(test)})", given=None, right=True)
    raise ValueError("no comparison with a literal value")


def _lacks(question: Question) -> str | None:
    tests = question.meta.get(TESTS)
    if not isinstance(tests, list) or not tests:
        return f"has no list of tests in meta.{TESTS}"
    for test in tests:
        try:
            read_test(test)
        except ValueError as error:
            return f"has the test {test!r:.80}, which is {error}"
    return None


def _prepare(settings: Any) -> str:
    """Return the version of Python. Raises BadInput without the user's consent, or where no sandbox can be had."""
    from platform import python_version

    from posttrain.rewards import sandbox

    if not consent.may_run_programs("", CONSENT):
        what = "the reward code runs programs that the model writes, which needs your consent"
        fix = f"Add {consent.FLAG} to the command, or the line run_code {CONSENT} to {consent.file()}: "
        raise BadInput(Problem(where="reward", what=what, fix=f"{fix}a recipe alone cannot allow it"))
    if (why := sandbox.check()) is not None:
        what = f"the sandbox for programs that the model writes cannot be had here: {why}"
        fix = "It needs Linux 5.14 with user namespaces: sysctl kernel.unprivileged_userns_clone=1 (Debian), "
        fix += "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), or a container started with --privileged"
        raise BadInput(Problem(where="reward", what=what, fix=fix))
    return f"Python {python_version()}"


def _score(attempt: Attempt) -> float | Score:
    from posttrain.rewards import sandbox  # listing the rewards must not load what runs programs

    activity.sign_of_life()  # thousands run in one call
    if not attempt.ended:
        return 0.0
    program = program_of(attempt.text)
    if not program.strip():
        return Score(value=0.0, note=NO_PROGRAM)
    tests = [read_test(each) for each in attempt.question.meta[TESTS]]
    calls = [each for each in tests if each.call is not None]
    if calls and (found := _by_calls(program, calls)) != Score(value=1.0):
        return found
    for test in tests:
        if test.given is not None:
            ran = sandbox.run(program, given=test.given)
            if ran.fault:
                return Score(value=0.0, note=ran.fault)
            if ran.output.decode(errors="replace").split() != str(test.right).split():
                return 0.0
    return 1.0


def _by_calls(program: str, tests: Sequence[Test]) -> Score:
    """Return the score of a program by the values of calls."""
    from posttrain.rewards import sandbox

    ran = sandbox.run(program, [str(test.call) for test in tests])
    found: dict[int, Any] = {}
    note = ran.fault or ENDED_EARLY
    for line in ran.output.split(b"\n"):
        try:
            said = json.loads(line)
            if "error" in said:
                note = f"the program raised {said['error']!s:.40}"
            if "value" in said:
                found.setdefault(said["number"], _value(said["value"]))
        except (*_UNREADABLE, TypeError, LookupError, AttributeError):
            continue
    if all(number in found and _equal(found[number], test.right) for number, test in enumerate(tests)):
        return Score(value=1.0)
    return Score(value=0.0, note="" if len(found) == len(tests) else note)


def _value(given: Any) -> Any:
    """Return a value as the sandbox writes it: what JSON has as it is, all else by the name of its type."""
    if not isinstance(given, dict):
        return given
    ((kind, inside),) = given.items()
    if kind == "dict":
        return {_value(key): _value(each) for key, each in inside}
    if kind == "bytes":
        return bytes(inside)
    if kind == "complex":
        return complex(*inside)
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(_value, inside))


def _equal(found: Any, right: Any) -> bool:
    try:
        return bool(found == right)
    except RecursionError:
        return False
