"""The commands of docs/first_adapter.md, typed as they stand, on a few chats and the base of the quickstart."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from posttrain.config.paths import shipped
from tests.support.command import main

DOC = (Path(__file__).parents[2] / "docs" / "first_adapter.md").read_text(encoding="utf-8")
TYPED = re.findall(r"^\$ (.*)$", DOC, re.MULTILINE)


def test_at_most_five_commands_lead_to_an_adapter_that_its_gate_passed(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    material = shipped("recipes") / "quickstart"
    Path("base").symlink_to(material / "base")
    chats = (material / "sft.jsonl").read_text().splitlines()[:80]
    Path("chats.jsonl").write_text("\n".join(chats) + "\n")
    assert len(TYPED) <= 5
    assert TYPED[0] == "pip install ."
    for line in TYPED[1:]:
        program, *words = shlex.split(line)
        assert program == "posttrain"
        assert main(*words) == 0, line
    assert "chats" in capsys.readouterr().out
    (state,) = Path("runs").glob("chats-*/run.json")
    assert json.loads(state.read_text())["stages"][0]["state"] == "promoted"
    assert (state.parent / "stages/sft/artifact/adapter_model.safetensors").exists()
