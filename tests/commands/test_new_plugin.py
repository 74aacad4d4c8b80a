"""``posttrain new-plugin``: its distribution installs and passes its tests; a bad name is rejected."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.config.compose import compose
from posttrain.host import plugins
from posttrain.plan import make_plan
from tests.support.installed import make_importable

ROOT = Path(__file__).resolve().parents[2]


def main(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution of a plugin named ``some_idea``."""
    folder = tmp_path_factory.mktemp("written")
    command = [sys.executable, "-m", "posttrain", "new-plugin", "some_idea"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "posttrain-some-idea"


@pytest.fixture(scope="module")
def site(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which it is installed. Building is not isolated: the build backend is the one that is here."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(written)], check=True)
    return site


def test_it_is_a_whole_distribution(written: Path) -> None:
    files = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    assert files == {
        ".github/workflows/test.yml", ".gitignore", "README.md", "pyproject.toml", "tests/test_some_idea.py",
        *(f"posttrain_some_idea/{name}" for name in (
            "__init__.py", "config.py", "stage.py", "conf/gate/some_idea.yaml", "conf/stage/some_idea.yaml",
            "recipes/some_idea.yaml",
        )),
    }  # fmt: skip
    assert not [name for name in files if "<<" in (written / name).read_text()]
    project = tomllib.loads((written / "pyproject.toml").read_text())["project"]
    assert project["name"] == "posttrain-some-idea"
    assert project["entry-points"]["posttrain"] == {"some_idea": "posttrain_some_idea"}


def test_its_code_is_in_order(written: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--no-cache", "."], cwd=written, check=True)
    subprocess.run([*ruff, "format", "--check", "--no-cache", "."], cwd=written, check=True)
    assert len((written / "posttrain_some_idea/stage.py").read_text().splitlines()) < 130


def test_installed_it_is_listed_and_planned(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_importable(site, monkeypatch)
    host = plugins.load()
    assert host.plugins["some_idea"].origin == "posttrain-some-idea 0.1.0"
    for words in (["recipe=some_idea"], ["recipe=quickstart", "+stage@some_idea=some_idea"]):
        step = make_plan(compose(host, words), host).steps[-1]
        assert (step.name, step.stage.name) == ("some_idea", "some_idea")
        assert set(step.tasks) == {"towns_facts", "towns_documents"}
        assert Path(step.sources[0].path).name == "sft.jsonl"


@pytest.mark.long
def test_installed_it_passes_its_own_tests(written: Path, site: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=written, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "11 passed" in result.stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("My-Stage", "Try my_stage."),
        ("2fast", "Try fast."),
        ("class", "cannot be the name of a stage"),
        ("null", "cannot be the name of a stage"),
        ("True", "cannot be the name of a stage"),
        ("nan", "cannot be the name of a stage"),
        ("../escape", "Try escape."),
        ("ünïcode", "cannot be the name of a stage"),
        ("a" * 41, f"Try {'a' * 40}."),
        ("", "the word behind it is empty"),
        ("sft", "is taken: it is a stage of posttrain"),
        ("dpo", "is taken: it is a stage of preference"),
        ("preference", "is taken: it is a plugin"),
        ("model", "is taken: it is a key of every recipe"),
        ("plugins", "is taken: it is what posttrain list plugins shows"),
        ("none", "conf/gate/none.yaml"),
        ("smollm2_sft_dpo", "recipes/smollm2_sft_dpo.yaml"),
    ],
)
def test_a_name_that_cannot_be_is_rejected(name: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("new-plugin", name) == 2
    assert expected in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("words", [[], ["a", "b"]])
def test_it_takes_one_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("new-plugin", *words) == 2
    assert "takes one name" in capsys.readouterr().err


def test_a_flag_of_another_command_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("new-plugin", "--force") == 2
    assert "--force: is no flag of this command" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_what_is_there_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("posttrain-mine").mkdir()
    assert main("new-plugin", "mine") == 2
    assert "posttrain-mine: exists already" in capsys.readouterr().err
    assert not list(Path("posttrain-mine").iterdir())


def test_a_full_disk_leaves_no_half_a_distribution(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*unused: object, **unused_too: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main("new-plugin", "mine") == 2
    assert "posttrain-mine: cannot be written: [Errno 28] No space left" in capsys.readouterr().err
    assert not Path("posttrain-mine").exists()
