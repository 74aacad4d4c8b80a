"""Settings of a stage that cannot be made or checked: their plugin is named, and no other recipe is affected."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.installed import command, install, listed

SETTINGS = """\
import os, sys
from dataclasses import dataclass
from posttrain import Stage, StageConfig, hookimpl

{decorator}
class Settings(StageConfig):
    steps: int = 3
    {body}

@hookimpl
def register_stages():
    return [
        Stage(name=name, summary="", config=Settings, run="a:b", parent="sft", records="documents")
        for name in ("bad", "worse")
    ]
"""
BROKEN_SETTINGS = {
    # the settings that nothing can be made of, and what is said about them
    "cannot be made": ("def __post_init__(self): raise RuntimeError('no')", "RuntimeError: no"),
    "end the process": ("def __post_init__(self): os._exit(3)", "ended the process with exit code 3 in settings"),
    "no default": ("rate: complex", "TypeError: "),
    "unknown type": ("names: set[int] = None", "Unexpected type annotation"),
    "wrong default": ("rate: int = 'three'", "could not be converted to Integer"),
}
BROKEN_CHECKS = {
    "raise": ("def problems(self): raise RuntimeError('out of order')", "RuntimeError: out of order"),
    "answer nothing": ("def problems(self): return None", "TypeError: 'NoneType'"),
    "answer nonsense": ("def problems(self): return 'bad'", "ValueError: not enough values"),
    "draw numbers": ("def problems(self): import random; random.random(); return []", "random numbers of random"),
    "end the process": ("def problems(self): os._exit(3)", "ended the process with exit code 3"),
}


def settings_of(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, decorator: str) -> None:
    text = SETTINGS.format(body=body, decorator=decorator)
    install(folder / "site", monkeypatch, "bad", {f"bad_settings_{abs(hash(str(folder)))}.py": text})


def planned(*words: str) -> subprocess.CompletedProcess[str]:
    return command("plan", "recipe=quickstart", *words)


@pytest.mark.parametrize("fault", BROKEN_SETTINGS)
def test_settings_that_nothing_can_be_made_of_break_no_other_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    body, says = BROKEN_SETTINGS[fault]
    settings_of(tmp_path, monkeypatch, body, "@dataclass(kw_only=True)")
    result = planned()
    assert result.returncode == 0, result.stderr
    result = planned("+stage@bad=bad")
    assert result.returncode == 6
    assert "no stage is named 'bad': plugin bad (bad-plugin 1.0) failed to load: " in result.stderr
    assert says in result.stderr


def test_settings_that_are_no_dataclass_of_their_own_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_of(tmp_path, monkeypatch, "rate: int = 3", decorator="")
    assert "must be a dataclass that inherits from StageConfig" in listed()["bad"]["summary"]


@pytest.mark.parametrize("fault", BROKEN_CHECKS)
def test_settings_that_cannot_be_checked_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    body, says = BROKEN_CHECKS[fault]
    settings_of(tmp_path, monkeypatch, body, "@dataclass(kw_only=True)")
    assert planned().returncode == 0
    result = planned("+stage@bad=bad", "+gate@bad.gate=none", "bad.data=a/b")
    assert result.returncode == 6, result.stderr
    assert result.stderr.startswith("error: plugin bad (bad-plugin 1.0) in problems: ")
    assert says in result.stderr
