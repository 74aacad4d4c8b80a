"""The site of the documentation, the image and the workflows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from mkdocs.exceptions import Abort

from tests.support.generators import DOCS, load_generator

ROOT = DOCS.parent


def test_the_site_is_built_and_every_page_is_in_its_navigation(tmp_path: Path) -> None:
    site = load_generator("site")
    site.build(tmp_path / "site")
    assert (tmp_path / "site" / "docs" / "users" / "laptop" / "index.html").exists()
    entries = [entry for section in site.NAV for entry in section.values()]
    listed = {page for entry in entries for page in ([entry] if isinstance(entry, str) else flat(entry))}
    pages = {str(path.relative_to(ROOT)) for path in [*DOCS.rglob("*.md"), *ROOT.glob("plugins/*/README.md")]}
    assert pages <= listed


def flat(entries: list[dict[str, str]]) -> list[str]:
    return [page for entry in entries for page in entry.values()]


@pytest.mark.parametrize("link", ["[gone](gone.md)", "[gone](recipes.md#gone)"])
def test_a_broken_link_is_an_error(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = load_generator("site")
    lay_out = site.lay_out

    def broken(folder: Path) -> None:
        lay_out(folder)
        shutil.rmtree(folder / "docs" / "examples")
        with (folder / "docs" / "cost.md").open("a", encoding="utf-8") as page:
            page.write(f"\n{link}\n")

    monkeypatch.setattr(site, "lay_out", broken)
    with pytest.raises(Abort):
        site.build(tmp_path / "site")


def test_the_image_is_built_of_what_exists_and_runs_as_no_root(tmp_path: Path) -> None:
    image = DockerfileParser(path=str(tmp_path), cache_content=True)
    image.content = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    steps = [(step["instruction"], step["value"]) for step in image.structure if step["instruction"] != "COMMENT"]
    copied = [word for kind, value in steps if kind == "COPY" for word in value.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)
    users = [value for kind, value in steps if kind == "USER"]
    assert users == ["posttrain"]
    assert steps[-2:] == [("ENTRYPOINT", '["posttrain"]'), ("CMD", '["recipe=quickstart"]')]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_a_workflow_names_the_commit_of_each_action_and_runs_tests_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for action in re.findall(r"uses: *(.*)", text):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action)
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    for step in steps:
        named = [word for word in step.get("run", "").split() if word.startswith(("tests/", "docs/"))]
        assert all((ROOT / word).exists() for word in named)
