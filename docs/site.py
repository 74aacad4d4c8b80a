"""Builds the site of the documentation: ``python docs/site.py FOLDER``. A broken link is an error.

Pages, READMEs and the files that they link to are laid out as in the repository, so that links work in both.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs/**/*.md", "docs/**/*.json", "docs/*.ipynb",
    "docs/examples/**/*", "plugins/*/README.md", "recipes/**/README.md", "recipes/**/*.yaml", "conf/**/*.yaml",
    "posttrain/hookspecs.py",
)  # fmt: skip
NAV: list[dict[str, Any]] = [
    {"Start": "README.md"},
    {
        "For you": [
            {"On a laptop": "docs/users/laptop.md"},
            {"On one GPU": "docs/users/one_gpu.md"},
            {"On a cluster": "docs/users/cluster.md"},
            {"Writing a plugin": "docs/users/plugin_author.md"},
            {"Gating in CI": "docs/users/ci.md"},
        ]
    },
    {
        "Use": [
            {"Your first adapter": "docs/first_adapter.md"},
            {"Recipes": "docs/recipes.md"},
            {"Data": "docs/data.md"},
            {"Gates": "docs/gates.md"},
            {"On policy": "docs/on_policy.md"},
            {"Devices": "docs/devices.md"},
            {"Time and cost": "docs/cost.md"},
            {"CI": "docs/ci.md"},
            {"Serving": "docs/serving.md"},
            {"Release": "docs/release.md"},
            {"Advice": "docs/advice.md"},
        ]
    },
    {
        "Reference": [
            {"Settings": "docs/settings.md"},
            {"Hooks": "docs/hooks.md"},
            {"API": "docs/api.md"},
            {"Tutorial": "docs/tutorial.md"},
            {"Preference": "plugins/preference/README.md"},
            {"GRPO": "plugins/grpo/README.md"},
            {"Safety": "plugins/safety/README.md"},
            {"Trackers": "plugins/trackers/README.md"},
        ]
    },
    {
        "About": [
            {"Promises": "docs/promises.md"},
            {"Decisions": "docs/decisions.md"},
            {"Contributing": "CONTRIBUTING.md"},
            {"Changes": "CHANGELOG.md"},
        ]
    },
]


def lay_out(folder: Path) -> None:
    """Copy the sources of the site into ``folder``."""
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                place = folder / path.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)


def build(output: Path) -> None:
    """Build the site into ``output``. Raises mkdocs' Abort when a link or a page of the navigation is missing."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        lay_out(pages)
        warn = {"not_found": "warn", "anchors": "warn", "absolute_links": "warn", "unrecognized_links": "info"}
        (Path(folder) / "mkdocs.yml").write_text("site_name: posttrain\n", encoding="utf-8")
        config = load_config(
            str(Path(folder) / "mkdocs.yml"),
            docs_dir=str(pages), site_dir=str(output.absolute()), nav=NAV, strict=True,
            theme={"name": "material", "font": False, "features": ["navigation.sections", "content.code.copy"]},
            plugins=["search"], markdown_extensions=["tables", "fenced_code", "admonition", "toc"],
            validation={"links": warn, "nav": {"omitted_files": "info", "not_found": "warn"}},
        )  # fmt: skip
        build_site(config)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    build(Path(sys.argv[1]))
