"""Where configuration and recipes lie, in a checkout and in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped(name: str) -> Path:
    """The folder ``conf`` or ``recipes``: inside the installed package, or beside it in a checkout."""
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def user_recipes() -> Path:
    """The user's own recipes; one of them may shadow a shipped one."""
    return Path(os.environ.get("POSTTRAIN_RECIPES", "recipes")).absolute()


def recipe_folders(plugin_folders: list[Path]) -> list[Path]:
    """Folders of recipes, the first one with a name wins."""
    folders = [user_recipes(), shipped("recipes"), *(folder / "recipes" for folder in plugin_folders)]
    return [folder for index, folder in enumerate(folders) if folder.is_dir() and folder not in folders[:index]]


def conf_folders(plugin_folders: list[Path]) -> list[Path]:
    """Folders of option groups such as ``model`` and ``gate``."""
    return [shipped("conf"), *(folder / "conf" for folder in plugin_folders if (folder / "conf").is_dir())]
