"""House rules: sizes of files and functions, docstrings of public names, the tree in README."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = sorted(
    path
    for folder in (ROOT / "posttrain", *ROOT.glob("plugins/*/posttrain_*"))
    for path in folder.rglob("*.py")
    if "templates" not in path.parts
)
MOST_LINES = 400
MOST_LINES_OF_FUNCTION = 60
SHIPPED = {"__init__.py", "__main__.py", "__pycache__", "_conf", "_recipes", "py.typed"}
"""Children of the package that no reader looks for."""

ALLOWED_IN_TESTING = {
    "posttrain", "posttrain.artifact", "posttrain.cli", "posttrain.config.compose", "posttrain.config.schema",
    "posttrain.errors", "posttrain.gate.spec", "posttrain.gate.verdict", "posttrain.hookspecs", "posttrain.host",
    "posttrain.host.plugins", "posttrain.model.base", "posttrain.model.loading", "posttrain.model.saving",
    "posttrain.pipeline", "posttrain.plan", "posttrain.run.directory", "posttrain.run.display",
}  # fmt: skip
"""Modules that ``posttrain.testing`` may import."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def definitions(path: Path) -> Iterator[Definition]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Definition):
            yield node


def public_definitions(tree: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Functions, classes and methods whose names have no underscore, at any depth of classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith(("_", "test_")):  # a test's name is a sentence
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def test_the_rules_are_asked_of_the_whole_product() -> None:
    rooms = {named(path).split("/")[1] for path in CODE if named(path).startswith("posttrain/")}
    assert {"engine", "gate", "scoring", "tokens", "pipeline.py"} <= rooms
    assert len(CODE) > 150


def test_files_are_short() -> None:
    sizes = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert {name: size for name, size in sizes.items() if size > MOST_LINES} == {}


def test_functions_are_short() -> None:
    sizes = {
        f"{named(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in CODE
        for node in definitions(path)
        if not isinstance(node, ast.ClassDef)
    }
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_FUNCTION} == {}
    assert sorted(sizes.values())[len(sizes) // 2] <= 10


@pytest.mark.parametrize("path", CODE, ids=named)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.name for node in public_definitions(tree) if not ast.get_docstring(node)] == []
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "a module's docstring names its noun"


def test_the_tools_for_authors_import_what_is_listed_and_no_more() -> None:
    """``posttrain.testing`` runs in other people's suites: each import is a promise to them."""
    imported = {
        node.module
        for path in (ROOT / "posttrain" / "testing").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("posttrain")
    }
    assert {name for name in imported if not name.startswith("posttrain.testing")} <= ALLOWED_IN_TESTING


def test_the_tree_in_readme_is_the_tree_on_disk() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^(?:```\w*\n)?( *)posttrain/\n((?:\1    \S.*\n)+)", text, re.MULTILINE)
    assert block is not None, "README has no tree of posttrain/"
    lines = [line.split(None, 1) for line in block[2].splitlines()]
    assert all(len(line) == 2 for line in lines), "every line of the tree says what the room is for"
    listed = [name.rstrip(",") for line in lines for name in line[:1]]
    folders = {path.name + "/" * path.is_dir() for path in (ROOT / "posttrain").iterdir() if path.name not in SHIPPED}
    assert sorted(listed) == sorted(folders)
