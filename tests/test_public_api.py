"""The names that plugins import from ``posttrain`` itself."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import posttrain


def test_every_public_name_is_the_one_that_its_module_defines() -> None:
    homes = {name: module for module, names in posttrain.HOMES.items() for name in names}
    assert sorted([*homes, "__version__"]) == sorted(posttrain.__all__)
    for name, module in homes.items():
        assert getattr(posttrain, name) is getattr(importlib.import_module(module), name)


def test_type_checkers_find_every_name_where_python_does() -> None:
    tree = ast.parse(Path(posttrain.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    read = {node.module: tuple(a.name for a in node.names) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert read == posttrain.HOMES


def test_a_star_and_dir_give_all_of_them() -> None:
    namespace: dict[str, object] = {}
    exec("from posttrain import *", namespace)
    assert set(posttrain.__all__) <= namespace.keys()
    assert set(posttrain.__all__) <= set(dir(posttrain))


def test_an_unknown_name_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Stagge'"):
        exec("from posttrain import Stagge")
