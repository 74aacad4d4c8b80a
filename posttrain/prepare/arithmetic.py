"""Arithmetic in answers: calculator annotations ``<<a=b>>`` and equations in prose, checked by value."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping

LONGEST = 200
"""Characters of an expression that is evaluated."""
LARGEST_EXPONENT = 64
LARGEST = 1e15
"""Magnitude up to which floating-point numbers are exact enough to be compared by their digits."""
ANNOTATION = re.compile(r"<<([^<>=\n]{1,200})=([^<>=\n]{1,60})>>")
NUMBER = r"\d{1,15}(?:\.\d{1,12})?"
EQUATION = re.compile(
    # Not behind a letter, a point, an operator or another sign of equality, of which the sum would be only a part.
    rf"(?<![\w.,=+*/^%×-])(?<![=+*/×x-] ){NUMBER}(?: ?[-+*/×] ?{NUMBER}){{1,20}}"
    rf" ?= ?(-?{NUMBER})(?![\w.]?\w| ?[-+*/=×^%])"
)
OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def wrong_annotations(text: str) -> Iterator[str]:
    """Yield the annotations ``<<expression=value>>`` whose value is not the expression's, to the digits written."""
    for found in ANNOTATION.finditer(text):
        if differs(found[1], found[2]):
            yield found[0]


def wrong_equations(text: str) -> Iterator[str]:
    """Yield the equations of numbers that do not hold; but no bare fractions, times and sums with letters."""
    for found in EQUATION.finditer(text):
        expression = found[0].partition("=")[0].strip()
        is_fraction = re.fullmatch(r"\d+ ?/ ?\d+", expression) is not None
        is_time = re.search(r"\b0\d", expression) is not None  # 0900 - 0130
        if not is_fraction and not is_time and differs(expression, found[1]):
            yield found[0]


def differs(expression: str, written: str) -> bool:
    """Return True when both sides are numbers and differ in the digits written; False for what cannot be read."""
    value, given = evaluate(expression), evaluate(written)
    if value is None or given is None or abs(value) > LARGEST:
        return False
    decimals = len(written.partition(".")[2].strip()) if "." in written else 0
    # Both roundings of a half are right, and so is a value cut at its last digit.
    return abs(value - given) > 10.0**-decimals * (1 - 1e-9) if decimals or value != int(value) else value != given


def evaluate(expression: str) -> float | None:
    """Return the value of an expression of numbers, brackets and + - * / // % **; None for anything else."""
    text = expression.strip().replace(",", "").replace("$", "").replace("×", "*").replace("÷", "/").replace("^", "**")
    if not text or len(text) > LONGEST:
        return None
    # Python reads no whole number with leading zeros, such as 007.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text.rstrip("%"))
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        number: float = node.value  # type: ignore[assignment]
        return number
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inner = _value(node.operand)
        return -inner if isinstance(node.op, ast.USub) else inner
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            if abs(right) > LARGEST_EXPONENT or abs(left) > LARGEST:
                raise ValueError("too large")
            return float(left**right)
        return OPERATORS[type(node.op)](left, right) if type(node.op) in OPERATORS else _unknown()
    return _unknown()


def _unknown() -> float:
    raise ValueError("not arithmetic")
