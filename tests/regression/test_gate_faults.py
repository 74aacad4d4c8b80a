"""``posttrain gate`` where files cannot be read or written, and where two are at it at once."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from posttrain import cli
from posttrain.scoring.cache import Blocks, ScoreCache
from tests.support.adapters import write_adapters
from tests.support.command import PROGRAM
from tests.support.warm import started


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


def words(material: Path, *more: str) -> list[str]:
    return ["gate", f"adapter={material / 'good'}", "gate=quiz", "--config-dir", str(material / "conf"), *more]


def gate(material: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words(material, *more))
    return int(str(ended.value.code))


def errors(path: str = "junit.xml") -> list[str]:
    return [error.get("message", "") for error in ElementTree.parse(path).iter("error")]


def test_an_output_root_that_is_a_file_is_named(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("")
    assert gate(material, "output_root=taken", "junit=junit.xml") == 2
    assert "taken/gates" in capsys.readouterr().err
    (message,) = errors()
    assert "cannot be read or written: Not a directory" in message


@pytest.mark.parametrize(
    ("owner", "method", "number", "code"),
    [
        (ScoreCache, "write", errno.EROFS, 2),
        (Blocks, "add", errno.ENOSPC, 2),
        (Blocks, "read", errno.EACCES, 2),
    ],
)
def test_a_cache_that_refuses_is_named_and_the_same_command_goes_on(
    material: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    owner: type, method: str, number: int, code: int,
) -> None:  # fmt: skip
    def refuse(*_: Any) -> None:
        raise OSError(number, "it refuses", "runs/cache/scores")

    with monkeypatch.context() as broken:
        broken.setattr(owner, method, refuse)
        assert gate(material, "junit=junit.xml") == code
    assert "it refuses" in capsys.readouterr().err
    (message,) = errors()
    assert "runs/cache/scores" in message
    assert gate(material) == 0


def test_a_report_that_cannot_be_written_is_named_beneath_the_verdict(
    material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    assert gate(material, "junit=folder") == 2
    said = capsys.readouterr()
    assert "quiz (lift, n 48)" in said.out
    assert "folder: cannot be read or written: Is a directory" in said.err


def test_two_gates_at_once_say_the_same(material: Path) -> None:
    command = [*PROGRAM, *words(material)]
    with started(command, stdout=subprocess.PIPE) as one, started(command, stdout=subprocess.PIPE) as other:
        tables = [process.communicate()[0] for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0]
    assert tables[0] == tables[1]
    with pytest.raises(SystemExit) as ended:
        cli.main(["ledger", "verify"])
    assert ended.value.code == 0
