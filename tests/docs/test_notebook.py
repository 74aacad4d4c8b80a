"""The notebook of the quickstart, run on fewer steps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.generators import DOCS

TINY = 'words = "recipe=quickstart stages=[sft] gate@sft.gate=none sft.max_steps=2"'


def test_the_notebook_runs(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "what was run is not committed"
    cells[0].source = TINY
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(working_folder)}}).execute()
    shown = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert "quickstart: sft" in shown[1]
    assert "quickstart: done" in shown[2]
    assert "<html" in cells[-1].outputs[0]["data"]["text/html"]
