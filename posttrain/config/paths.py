"""Folders of configuration and recipes, in a checkout and in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped(name: str) -> Path:
    """Return the folder ``conf`` or ``recipes``: inside the installed package, or beside it in a checkout."""
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def user_recipes() -> Path:
    """Return the folder of the user's own recipes, which may shadow shipped ones."""
    return Path(os.environ.get("POSTTRAIN_RECIPES", "recipes")).absolute()


def recipe_folders(plugin_folders: list[Path]) -> list[Path]:
    """Return the folders of recipes; the first with a name wins."""
    folders = [user_recipes(), shipped("recipes"), *(folder / "recipes" for folder in plugin_folders)]
    return [folder for index, folder in enumerate(folders) if folder.is_dir() and folder not in folders[:index]]


def conf_folders(plugin_folders: list[Path]) -> list[Path]:
    """Return the folders of option groups such as ``model`` and ``gate``."""
    return [shipped("conf"), *(folder / "conf" for folder in plugin_folders if (folder / "conf").is_dir())]
